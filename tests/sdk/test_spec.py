"""Specs from files and mappings: right ones come through whole, wrong ones name their field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cliptune.errors import InvalidInputError, SpecError
from cliptune.spec import load_spec, spec_from_mapping, spec_to_mapping, validate_shape, with_settings
from cliptune.spec_shape import RULES, Choice, Pattern, Range
from cliptune.v1 import spec_pb2

BASE: dict[str, Any] = {
    "name": "cells",
    "model": {"name": "cliptune-tiny-vit"},
    "data": {"train": "pairs.csv"},
}
TOML = """
name = "cells"
[model]
name = "cliptune-tiny-vit"
[data]
train = "pairs.csv"
[train]
epochs = 2
learning_rate = 1e-4
seed = 18446744073709551615
[[evaluation.classes]]
label = "ok"
prompts = ["an intact cell"]
[[evaluation.classes]]
label = "crack"
[publish]
aliases = ["prod"]
serve = false
"""


def refused(*settings: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        spec_from_mapping(with_settings(BASE, settings))
    return caught.value


def test_toml_json_and_yaml_of_one_content_make_one_spec(tmp_path: Path) -> None:
    toml = tmp_path / "spec.toml"
    toml.write_text(TOML)
    spec = load_spec(toml)
    assert spec.train.epochs == 2
    assert spec.train.seed == 2**64 - 1
    assert [group.label for group in spec.evaluation.classes] == ["ok", "crack"]
    assert spec.publish.HasField("serve")
    assert not spec.publish.serve
    text = json.dumps(spec_to_mapping(spec))
    (tmp_path / "spec.json").write_text(text)
    (tmp_path / "spec.yaml").write_text(text.replace("0.0001", "1e-4"))  # YAML 1.1 reads 1e-4 as a text
    assert load_spec(tmp_path / "spec.json") == spec
    assert load_spec(tmp_path / "spec.yaml") == spec


def test_a_spec_survives_its_mapping(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(TOML)
    spec = load_spec(tmp_path / "spec.toml")
    assert spec_from_mapping(spec_to_mapping(spec)) == spec


def test_camel_case_names_of_the_json_form_are_understood() -> None:
    assert spec_from_mapping({**BASE, "train": {"batchSize": 8}}).train.batch_size == 8


def test_tables_of_names_and_values_come_through_whole() -> None:
    spec = spec_from_mapping(
        {
            **BASE,
            "loss": {"parameters": {"margin": 0.2}},
            "evaluation": {"label_names": {"bcc": "basal cell carcinoma"}},
        }
    )
    assert dict(spec.loss.parameters) == {"margin": 0.2}
    assert dict(spec.evaluation.label_names) == {"bcc": "basal cell carcinoma"}
    assert spec_from_mapping(spec_to_mapping(spec)) == spec
    assert refused('loss.parameters.margin="wide"').metadata["path"] == "loss.parameters.margin"
    assert refused("loss.parameters=3").metadata["path"] == "loss.parameters"


def test_settings_change_the_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(TOML)
    settings = ["train.epochs=3", "train.epochs=4", 'publish.aliases=["a", "b"]', "loss.name=multi_positive"]
    spec = load_spec(tmp_path / "spec.toml", settings)
    assert spec.train.epochs == 4
    assert list(spec.publish.aliases) == ["a", "b"]
    assert spec.loss.name == "multi_positive"


def test_paths_that_exist_beside_the_file_become_absolute_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(TOML + '\n[resources]\ndevice = "cpu"\n')
    assert load_spec(tmp_path / "spec.toml").data.train == "pairs.csv"
    (tmp_path / "pairs.csv").write_text("image,caption\n")
    assert load_spec(tmp_path / "spec.toml").data.train == str(tmp_path / "pairs.csv")


@pytest.mark.parametrize(
    ("setting", "path", "meant"),
    [
        ("train.batchsize=3", "train.batchsize", "train.batch_size"),
        ("batch_size=4", "batch_size", "train.batch_size"),
        ('evaluation.classes=[{"lable": "x"}]', "evaluation.classes[0].lable", "evaluation.classes[0].label"),
    ],
)
def test_an_unknown_field_names_its_path_and_the_one_that_was_meant(
    setting: str, path: str, meant: str
) -> None:
    error = refused(setting)
    assert error.metadata["path"] == path
    assert meant in error.message
    assert error.metadata["allowed"]


@pytest.mark.parametrize(
    ("setting", "path", "allowed"),
    [
        ("train.batch_size=1", "train.batch_size", ">= 2"),
        ("train.batch_size=true", "train.batch_size", "a whole number >= 2"),
        ("train.epochs=2.5", "train.epochs", "a whole number >= 1"),
        ("train.epochs=99999999999", "train.epochs", "a whole number >= 1"),
        ("train.seed=-1", "train.seed", "a whole number from 0 to 18446744073709551615"),
        ("train.learning_rate=high", "train.learning_rate", "a number > 0 and <= 10"),
        ("train.learning_rate=NaN", "train.learning_rate", "a number > 0 and <= 10"),
        ("train.precision=fp8", "train.precision", "auto, fp32, bf16, fp16"),
        ("train=3", "train", "a table with the fields epochs"),
        ("model.name=foo:bar", "model.name", "registry:NAME"),
        ("model.name=7", "model.name", "a text"),
        ("resources.device=gpu", "resources.device", "cuda:N"),
        ("publish.serve=1", "publish.serve", "true, false"),
        ("publish.aliases=prod", "publish.aliases", "a list"),
        ('publish.aliases=["a/b"]', "publish.aliases[0]", "a letter or digit"),
        ("name=../up", "name", "a letter or digit"),
        ("data.duplicates=keep", "data.duplicates", "notice, drop, refuse"),
        ("data.leakage=drop", "data.leakage", "refuse, notice"),
        ("data.reading.window=40", "data.reading.window", "CENTER,WIDTH"),
        ("data.reading.channels=[0,1]", "data.reading.channels", "none, one or three planes"),
        ('data.caption_templates=["a tile"]', "data.caption_templates[0]", "{label}"),
        ('evaluation.classes=[{"label": ""}]', "evaluation.classes[0].label", "not empty"),
        ('evaluation.classes=[{"label":"a"},{"label":"a"}]', "evaluation.classes[1].label", "other than"),
        ('evaluation.classes=[{"label":"a"}]', "evaluation.classes", "at least two"),
        (
            'evaluation.classes=[{"label":"a","prompts":[" "]}]',
            "evaluation.classes[0].prompts[0]",
            "not empty",
        ),
    ],
)
def test_a_wrong_value_names_its_path_and_what_is_allowed(setting: str, path: str, allowed: str) -> None:
    error = refused(setting)
    assert error.metadata["path"] == path
    assert allowed in error.metadata["allowed"]
    assert path in error.message


@pytest.mark.parametrize("path", ["name", "model.name", "data.train"])
def test_a_missing_field_is_named(path: str) -> None:
    assert refused(f"{path}=").metadata["path"] == path


def test_every_rule_belongs_to_a_field_and_refuses_what_it_says() -> None:
    for path, rule in RULES.items():
        wrong: dict[type, str] = {Range: "-1", Choice: "neither", Pattern: "/"}
        error = refused(f"{path}={wrong[type(rule)]}")
        assert error.metadata["path"] == path


def test_a_spec_built_as_a_message_is_checked_alike() -> None:
    spec = spec_pb2.JobSpec(name="a", model={"name": "ViT-B-32"}, data={"train": "x.csv"})
    validate_shape(spec)
    spec.checkpoint.keep = 0
    with pytest.raises(SpecError, match=r"checkpoint\.keep is 0"):
        validate_shape(spec)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", "name = ", "TOML"),
        ("a.json", "{", "JSON"),
        ("a.yaml", "a: [", "YAML"),
        ("a.ini", "x", ".toml, .json, .yaml, .yml"),
        ("a.json", "[1]", "not a table"),
    ],
)
def test_a_file_that_is_no_spec_says_why(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError, match=says):
        load_spec(tmp_path / name)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_spec(tmp_path / "none.toml")


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="PATH=VALUE"):
        with_settings(BASE, ["train.epochs"])
