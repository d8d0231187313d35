"""`cliptune eval`: a model over image sizes, as a table, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cliptune.cli.main import build_parser
from cliptune.errors import InvalidInputError, UnavailableError
from cliptune_model.clip import build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.source import ModelSource
from cliptune_trainer.examining.cli import verb


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = build(ModelSource(name="cliptune-test-vit"), seed=2)
    folder = tmp_path_factory.mktemp("model") / "export"
    export_model(clip, folder, manifest_of(clip, serving_size=(48, 48)))
    return folder


def called(*arguments: str) -> int:
    options = build_parser({"eval": verb}).parse_args(["eval", *arguments])
    return verb.run(options)


def test_a_table_of_sizes_is_printed_with_the_figures_over_all_and_what_was_rounded(
    model: Path, tiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(tiles / "tiles.csv"), "--set", "data.label_column=label"]
    assert called(str(model), *data, "--resolutions", "16,33,48", "--latency-budget-ms", "1000") == 0
    printed = capsys.readouterr()
    assert "resolutions[1] is 33: images are 32 pixels, a multiple of the patch (8)" in printed.err
    head, columns, *rows, summary = printed.out.strip().splitlines()
    assert head.endswith("zero_shot/auroc")
    assert columns.split() == ["SIZE", "METRIC", "IMAGES/S", "LATENCY", "MEMORY"]
    assert [row.split()[0] for row in rows] == ["16", "32", "48"]
    assert sum("worst" in row for row in rows) == 1
    assert "within 1000 ms" in summary
    assert "blur_2px" in summary


def test_json_and_a_picture_are_written_and_a_model_is_measured_where_it_is_served(
    model: Path, tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(tiles / "tiles.csv"), "--set", "data.label_column=label"]
    told = ["--set", "evaluation.degradations=false", "--json", "--output", str(tmp_path / "sweep")]
    assert called(f"local-dir:{model}", *data, *told) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [size["height"] for size in printed["sizes"]] == [48]
    assert printed["sizes"][0]["metrics"].keys() >= {"zero_shot/auroc", "zero_shot/accuracy"}
    assert json.loads((tmp_path / "sweep" / "resolutions.json").read_text()) == printed
    with Image.open(tmp_path / "sweep" / "resolutions.png") as picture:
        assert picture.width > 300


def test_a_specs_validation_rows_classes_and_prompts_are_taken(
    model: Path, tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "job.toml"
    spec.write_text(
        f"""
        name = "tiles"
        [model]
        name = "another"
        [data]
        train = "{tiles / "tiles.csv"}"
        label_column = "label"
        group_column = "module"
        [evaluation]
        main_metric = "zero_shot/accuracy"
        degradations = false
        """
    )
    assert called(str(model), "--spec", str(spec), "--resolutions", "16", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["main_metric"] == "zero_shot/accuracy"
    assert [size["height"] for size in printed["sizes"]] == [16]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give rows with --data, or a job's spec with --spec"),
        (["--data", "tiles.csv", "--resolutions", "32,16"], r"resolutions\[1\] is 16"),
        (["--data", "tiles.csv", "--resolutions", "4"], "at least 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: Path, tiles: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tiles)
    with pytest.raises(InvalidInputError, match=told):
        called(str(model), *arguments)


def test_sizes_that_are_no_numbers_are_a_wrong_command_line(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        called(str(model), "--data", "x.csv", "--resolutions", "small,large")
    assert "is no list of pixels" in capsys.readouterr().err


def test_another_name_is_looked_for_at_the_daemon(tiles: Path) -> None:
    with pytest.raises(UnavailableError):
        called("cells@prod", "--data", str(tiles / "tiles.csv"), "--address", "127.0.0.1:9")
