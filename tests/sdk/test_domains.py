"""Domain recipes: data files, laid under a spec; what each says of the images it is for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import cliptune.domains as package
from cliptune.cli.domains import domains as verb
from cliptune.cli.main import build_parser
from cliptune.domains import NAMES, chosen_later, layered, load_recipe, recipe
from cliptune.domains.paths import set_paths, value_at
from cliptune.errors import SpecError
from cliptune.spec import spec_from_mapping
from cliptune.spec_shape import validate_shape
from cliptune.v1 import spec_pb2

FILES = Path(package.__file__).parent
BASE: dict[str, Any] = {"name": "cells", "model": {"name": "m"}, "data": {"train": "pairs.csv"}}


def spec(domain: str = "", **parts: dict[str, Any]) -> spec_pb2.JobSpec:
    joined = {name: {**BASE.get(name, {}), **values} for name, values in parts.items()}
    return spec_from_mapping({**BASE, "domain": domain, **joined})


def test_a_data_file_belongs_to_each_domain_and_to_nothing_else() -> None:
    assert {path.stem for path in FILES.glob("*.toml")} == {*NAMES, "defaults"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_gives_a_reason_for_each_field_that_it_sets_and_for_no_other(name: str) -> None:
    about = load_recipe(name)
    assert about.summary
    assert all(about.reason(path) for path, _ in about.fields())
    parts = {about.reasoned_part(path) for path, _ in about.fields()}
    assert set(about.why) == parts


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_nothing_of_whose_the_data_is_or_what_the_job_may_use(name: str) -> None:
    ours = {"data", "loss", "evaluation", "train"}
    assert {field.name for field, _ in recipe(name).ListFields()} <= ours
    for path in ("data.train", "data.label_column", "data.split_column", "evaluation.classes"):
        assert not value_at(recipe(name), path)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_in_a_domain_has_the_shape_of_a_spec(name: str) -> None:
    validate_shape(layered(spec(name)).spec)


def test_recipes_keep_captions_true() -> None:
    medical, scientific = recipe("medical").data.augment, recipe("scientific").data.augment
    for turn in ("flip_horizontal", "flip_vertical", "rotate_quarter"):
        assert not getattr(medical, turn)  # left is left
    assert scientific.rotate_quarter
    assert scientific.flip_vertical
    for counted in (medical, scientific):  # counts and sizes
        assert counted.crop_min_area in (0, 1)
    assert recipe("industrial").data.augment.crop_min_area >= 0.9  # small defects stay
    for name in NAMES:  # stains, channels, rust, "a red car"
        assert recipe(name).data.augment.hue == recipe(name).data.augment.saturation == 0


def test_what_a_spec_says_holds_over_its_domain_and_the_domain_over_the_defaults() -> None:
    found = layered(spec("medical", evaluation={"prompt_templates": ["{label} stain"]}, train={"epochs": 2}))
    assert found.spec.train.epochs == 2
    assert list(found.spec.evaluation.prompt_templates) == ["{label} stain"]
    assert found.spec.loss.name == recipe("medical").loss.name
    assert found.spec.data.augment == recipe("medical").data.augment
    assert found.spec.train.warmup_fraction == 0.1
    assert found.origins["train.epochs"] == found.origins["evaluation.prompt_templates"] == "yours"
    assert found.origins["loss.name"] == "domain medical"
    assert found.origins["train.warmup_fraction"] == "default"
    assert list(found.origins) == set_paths(found.spec)
    assert found.from_domain() == ["data.augment", "loss.name", "evaluation.main_metric"]


def test_without_a_domain_only_defaults_are_added() -> None:
    found = layered(spec())
    assert found.domain is None
    assert found.from_domain() == []
    assert set(found.origins.values()) == {"yours", "default"}
    assert found.spec.loss.name == "infonce"
    assert found.spec.data.augmentation == "none"


def test_a_spec_laid_over_its_layers_again_stays_as_it_is() -> None:
    once = layered(spec("industrial")).spec
    again = layered(once)
    assert again.spec == once
    assert set(again.origins.values()) == {"yours"}


def test_the_layers_are_not_changed_by_what_is_laid_over_them() -> None:
    layered(spec("scientific")).spec.data.augment.rotate_degrees = 45
    recipe("scientific").data.augment.rotate_degrees = 45
    assert recipe("scientific").data.augment.rotate_degrees == 0
    assert layered(spec()).spec is not layered(spec()).spec


@pytest.mark.parametrize(
    "data", [{"augmentation": "none"}, {"augment": {}}, {"augment": {"rotate_degrees": 3}}]
)
def test_a_spec_that_says_how_images_change_means_nothing_else(data: dict[str, Any]) -> None:
    found = layered(spec("scientific", data=data)).spec.data
    assert not found.augment.flip_vertical
    assert found.augment.rotate_degrees == data.get("augment", {}).get("rotate_degrees", 0)
    assert found.HasField("augment") == ("augment" in data)
    assert found.reading.window == "percentile"


def test_parameters_belong_to_the_loss_that_they_came_with(tmp_path: Path) -> None:
    one = layered(spec("medical", loss={"terms": [{"name": "infonce"}]}))
    assert one.spec.loss.name == ""
    assert [term.name for term in one.spec.loss.terms] == ["infonce"]
    other = layered(spec("medical", loss={"parameters": {"a.b": 0.5}}))
    assert other.spec.loss.name == recipe("medical").loss.name
    assert other.origins["loss.parameters.a.b"] == "yours"
    assert other.value("loss.parameters.a.b") == 0.5


def test_fields_settled_later_are_fields_without_a_default() -> None:
    fixed = layered(spec()).origins
    for path in chosen_later():
        value_at(spec_pb2.JobSpec(), path)  # is a field
        assert path not in fixed


def test_an_unknown_domain_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SpecError, match=r"did you mean medical") as caught:
        load_recipe("medcial")
    assert caught.value.metadata["path"] == "domain"
    with pytest.raises(SpecError, match=r"did you mean scientific.*general, industrial, medical"):
        spec("science")
    with pytest.raises(SpecError, match=r"domain is 'art'; allowed: general, industrial"):
        spec("art")


def test_a_spec_may_not_say_twice_how_images_change() -> None:
    with pytest.raises(SpecError, match=r"data\.augment, which says it in full"):
        spec(data={"augmentation": "flip", "augment": {"hue": 0.1}})


def test_the_guide_names_every_domain_and_every_change_to_images() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "domains.md").read_text(encoding="utf-8")
    for name in (*NAMES, *spec_pb2.AugmentSpec.DESCRIPTOR.fields_by_name):
        assert name in guide


def run(*arguments: str) -> int:
    options: argparse.Namespace = build_parser({"domains": verb}).parse_args(["domains", *arguments])
    return verb.run(options)


def test_the_command_lists_shows_and_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed and load_recipe(name).summary in listed for name in NAMES)

    assert run("show", "medical") == 0
    shown = capsys.readouterr().out
    assert "data.augment.rotate_degrees = 10.0" in shown
    assert "# no flips: left and right are part of a finding" in shown

    file = tmp_path / "spec.toml"
    file.write_text('name = "cells"\n[model]\nname = "m"\n[data]\ntrain = "pairs.csv"\n[train]\nepochs = 2\n')
    assert run("explain", str(file), "--set", "domain=medical") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train.epochs", "2", "yours"] in lines
    assert ["loss.name", '"multi_positive"', "domain", "medical"] in lines
    assert ["train.schedule", '"cosine"', "default"] in lines
    assert any(line[:3] == ["train.learning_rate", "-", "later:"] for line in lines)


def test_the_command_answers_programs_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == list(NAMES)
    assert run("show", "general", "--json") == 0
    assert spec_from_mapping({**BASE, **json.loads(capsys.readouterr().out)["spec"], "data": BASE["data"]})
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({**BASE, "domain": "scientific"}))
    assert run("explain", str(file), "--json") == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["origins"]["data.reading.window"] == "domain scientific"
    assert spec_from_mapping(explained["spec"]) == layered(spec("scientific")).spec
    assert "hot pixel" in explained["why"]["data.reading.window"]
