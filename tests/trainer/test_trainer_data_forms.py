from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from google.protobuf import json_format
from PIL import Image

from cliptune.errors import ConflictError, DataError, MissingColumnError, PathOutsideRootsError, SpecError
from cliptune.internal.v1 import trainer_pb2
from cliptune.spec_shape import validate_shape
from cliptune.v1 import spec_pb2
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Dataset, read_dataset
from cliptune_trainer.data.forms.columns import Wording
from cliptune_trainer.data.loading.loader import Batch, Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.row_groups import RowGroups
from cliptune_trainer.data.source import ParquetCell
from cliptune_trainer.spec import DataConfig, from_proto
from tests.trainer.batches import same
from tests.trainer.conftest import MakeJob

ANYWHERE = DataRoots()
COLOURS = ("red", "green", "blue")


def read(train: Path | str, *, wording: Wording | None = None, **options: Any) -> Dataset:
    config = DataConfig(train=str(train), **{"validation_fraction": 0.0, **options})
    return read_dataset(config, ANYWHERE, seed=0, wording=wording or Wording())


def captions(dataset: Dataset) -> list[tuple[int, str]]:
    return [(pair.row, pair.caption) for pair in dataset.train.pairs]


def load(dataset: Dataset, clip: Clip, *, first: int = 0, total: int = 6, workers: int = 0) -> list[Batch]:
    with Loader(dataset.train, clip, batch_size=8, seed=2, workers=workers) as loader:
        return list(loader.batches(first, total))


@pytest.fixture
def folder(tiles: Path, tmp_path: Path) -> Path:
    """Nine of the tiles, to name in one's own way."""
    for row in range(9):
        shutil.copy(tiles / f"{row}.png", tmp_path)
    return tmp_path


# -- JSON lines


def write_lines(folder: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def test_json_lines_give_several_captions_and_labels_of_an_image(folder: Path) -> None:
    file = write_lines(
        folder,
        {"image": "0.png", "caption": ["a tile", "something red", "a tile"], "label": ["red", "tile"]},
        "",
        {"image": "1.png", "caption": "a green tile", "label": "green|tile", "score": 0.5, "ok": True},
        {"image": "2.png", "caption": "a blue tile", "label": 7},
    )
    dataset = read(file, label_column="label", label_separator="|")
    assert captions(dataset) == [
        (1, "a tile"),
        (1, "something red"),
        (3, "a green tile"),
        (4, "a blue tile"),
    ]
    assert [pair.labels for pair in dataset.train.pairs[1:]] == [("red", "tile"), ("green", "tile"), ("7",)]
    assert dataset.train.pairs[0].label == "red"
    assert dataset.train.image_ids.tolist() == [0, 0, 1, 2]
    assert dataset.labels == ["7", "green", "red", "tile"]
    assert read(file, label_column="label").labels == ["7", "green|tile", "red", "tile"]


def test_lines_that_cannot_be_used_are_named_by_their_number(folder: Path) -> None:
    file = write_lines(
        folder,
        {"image": "0.png", "caption": "a tile"},
        "{",
        "[1]",
        {"image": "1.png"},
        {"caption": "no image"},
        {"image": "2.png", "caption": ["a tile", 3, " "]},
        {"image": ["3.png"], "caption": "a tile"},
        {"image": "gone.png", "caption": "a tile"},
    )
    dataset = read(file, max_bad_fraction=0.9)
    assert captions(dataset) == [(1, "a tile"), (6, "a tile"), (6, "3")]
    reasons = {2: "not JSON", 3: "no object", 4: "caption: the text is empty"}
    reasons |= {5: "no image", 7: "no image", 8: "No such file"}
    for told, (row, reason) in zip(dataset.bad, reasons.items(), strict=True):
        assert f", row {row}: " in told
        assert reason in told


def test_a_column_that_no_line_has_names_those_that_they_have(folder: Path) -> None:
    file = write_lines(folder, {"image": "0.png", "text": "a tile"}, {"image": "1.png", "text": "two"})
    with pytest.raises(MissingColumnError) as caught:
        read(file)
    assert caught.value.metadata["found"] == "image, text"
    assert caught.value.metadata["path"] == "data.caption_column"
    assert len(read(file, caption_column="text").train) == 2


def test_json_that_is_not_a_line_each_names_the_form(folder: Path) -> None:
    (folder / "rows.json").write_text("[]")
    with pytest.raises(DataError, match=r"\.jsonl"):
        read(folder / "rows.json")


def test_images_of_json_lines_stay_within_the_roots(folder: Path, tiles: Path) -> None:
    file = write_lines(folder, {"image": str(tiles / "0.png"), "caption": "a tile"})
    with pytest.raises(PathOutsideRootsError):
        read_dataset(DataConfig(train=str(file)), DataRoots([folder]), seed=0)


# -- captions from labels


def test_rows_without_a_caption_get_one_from_their_labels(folder: Path) -> None:
    lines = ["image,caption,label", "0.png,a tile by hand,red", "1.png,,green|round", "2.png,,blue"]
    (folder / "rows.csv").write_text("\n".join(lines))
    options: dict[str, Any] = {"label_column": "label", "label_separator": "|"}
    templates = ("a {label} tile", "{label}, a tile")
    dataset = read(
        folder / "rows.csv",
        caption_templates=templates,
        wording=Wording(names={"green": "leaf green"}),
        **options,
    )
    assert captions(dataset) == [
        (1, "a tile by hand"),
        (2, "a leaf green and round tile"),
        (3, "a blue tile"),
    ]
    assert [pair.variants for pair in dataset.train.pairs] == [
        (),
        ("a leaf green and round tile", "leaf green and round, a tile"),
        ("a blue tile", "blue, a tile"),
    ]
    with pytest.raises(DataError, match=r"2 of 3 rows.*the text is empty"):
        read(folder / "rows.csv", **options)
    only_labels = "\n".join(["image,label", "0.png,red", "1.png,green"])
    (folder / "labels.csv").write_text(only_labels)
    assert len(read(folder / "labels.csv", caption_templates=templates, label_column="label").train) == 2


def test_a_template_without_a_place_for_the_label_is_refused() -> None:
    with pytest.raises(SpecError, match=r"data\.caption_templates\[1\]"):
        DataConfig(train="x.csv", caption_templates=("a {label}", "a tile"))


def test_each_epoch_draws_a_caption_anew_and_a_resumed_run_draws_the_same(tiles: Path, clip: Clip) -> None:
    lines = ["image,label", *(f"{row}.png,{COLOURS[row % 3]}" for row in range(24))]
    table = tiles / "labels-only.csv"
    table.write_text("\n".join(lines))
    templates = ("a {label} tile", "{label}", "the colour {label}", "photo: {label}")
    dataset = read(table, label_column="label", caption_templates=templates)
    whole = load(dataset, clip, total=9)
    assert all(map(same, whole[4:], load(dataset, clip, first=4, total=9)))
    drawn = [
        {tuple(tokens) for batch in whole[epoch * 3 : epoch * 3 + 3] for tokens in batch.tokens_BL.tolist()}
        for epoch in range(3)
    ]
    assert all(len(texts) > 6 for texts in drawn)  # of twelve
    # Rows of one label share their caption's identity, whatever was drawn.
    assert len(set(torch.cat([batch.caption_ids_B for batch in whole]).tolist())) == 3


# -- a folder of images


def class_folders(tiles: Path, folder: Path, splits: Sequence[str] = ("",)) -> Path:
    for row in range(12):
        target = folder / splits[row // 3 % len(splits)] / COLOURS[row % 3] / "more"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiles / f"{row}.png", target / f"tile {row}.PNG")
    (folder / "README.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    shutil.copy(tiles / "0.png", folder / ".cache" / "0.png")
    return folder


def test_a_folder_of_class_folders_is_a_data_set(tiles: Path, tmp_path: Path) -> None:
    dataset = read(class_folders(tiles, tmp_path), wording=Wording(names={"red": "crimson"}))
    assert dataset.labels == sorted(COLOURS)
    assert len(dataset.train) == 12
    found = {pair.label: pair.caption for pair in dataset.train.pairs}
    assert found == {
        "red": "a photo of a crimson",
        "green": "a photo of a green",
        "blue": "a photo of a blue",
    }
    assert [pair.row for pair in dataset.train.pairs] == list(range(1, 13))
    assert dataset.train.pairs[0].reference == "blue/more/tile 11.PNG"
    prompts = Wording(templates=("a scan of {label}", "{label}"))
    assert read(tmp_path, wording=prompts).train.pairs[0].variants == ("a scan of blue", "blue")
    given = read(tmp_path, wording=prompts, caption_templates=("all {label}",))
    assert given.train.pairs[0].caption == "all blue"


@pytest.mark.parametrize(
    ("splits", "rows"), [(("train", "val"), (6, 6)), (("Train", "valid", "test", "train"), (6, 3))]
)
def test_folders_named_as_splits_split(
    tiles: Path, tmp_path: Path, splits: tuple[str, ...], rows: tuple[int, int]
) -> None:
    dataset = read(class_folders(tiles, tmp_path, splits), validation_fraction=0.3)
    assert (len(dataset.train), len(dataset.validation)) == rows
    assert dataset.labels == sorted(COLOURS)


def test_folders_named_train_and_test_leave_validation_rows_to_be_chosen(tiles: Path, tmp_path: Path) -> None:
    dataset = read(class_folders(tiles, tmp_path, ("train", "test")), validation_fraction=0.34)
    assert (len(dataset.train), len(dataset.validation)) == (4, 2)


def test_a_folder_that_is_no_data_set_says_what_it_holds(tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar shards, no \.parquet files and no images"):
        read(tmp_path)
    (tmp_path / "images").mkdir()
    shutil.copy(tiles / "0.png", tmp_path / "images")
    with pytest.raises(DataError, match=r"1 of them \(images\); if a table names the images"):
        read(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="to_parquet"):
        read(tmp_path)


def test_columns_of_a_folder_of_images_are_refused(tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"data\.group_column"):
        read(class_folders(tiles, tmp_path), group_column="patient")


def test_links_out_of_a_folder_of_images_are_refused(tiles: Path, tmp_path: Path) -> None:
    (class_folders(tiles, tmp_path) / "red" / "link.png").symlink_to(tiles / "0.png")
    with pytest.raises(PathOutsideRootsError):
        read_dataset(DataConfig(train=str(tmp_path)), DataRoots([tmp_path]), seed=0)


# -- parquet


def write_parquet(
    tiles: Path, file: Path, rows: range, *, group: int = 4, kind: str = "struct", numbered: bool = True
) -> Path:
    """As `datasets` writes images: {bytes, path}, and classes as numbers with their names in the schema."""
    content = [(tiles / f"{row}.png").read_bytes() for row in rows]
    if kind == "struct":
        image: Any = [{"bytes": each, "path": f"{row}.png"} for row, each in zip(rows, content, strict=True)]
    elif kind == "bytes":
        image = content
    elif kind == "paths":
        image = [{"bytes": None, "path": f"{row}.png"} for row in rows]
    else:
        image = [f"{row}.png" for row in rows]
    types = {"bytes": pa.binary(), "strings": pa.string()}
    default = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array(image, types.get(kind, default)),
            "caption": [[f"a {COLOURS[row % 3]} tile", f"tile {row}"] for row in rows],
            "label": pa.array([row % 3 for row in rows], pa.int64()),
        }
    )
    if numbered:
        features = {"label": {"names": list(COLOURS), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group)
    return file


@pytest.mark.parametrize("kind", ["struct", "bytes", "paths", "strings"])
def test_parquet_files_hold_the_rows_that_json_lines_of_the_same_images_hold(
    tiles: Path, clip: Clip, kind: str
) -> None:
    rows = range(24)
    file = write_parquet(tiles, tiles / f"{kind}.parquet", rows, kind=kind)
    lines = [
        {"image": f"{r}.png", "caption": [f"a {COLOURS[r % 3]} tile", f"tile {r}"], "label": COLOURS[r % 3]}
        for r in rows
    ]
    (tiles / "same.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ours, theirs = (read(each, label_column="label") for each in (file, tiles / "same.jsonl"))
    assert captions(ours) == captions(theirs)
    assert [pair.labels for pair in ours.train.pairs] == [pair.labels for pair in theirs.train.pairs]
    assert all(map(same, load(ours, clip), load(theirs, clip)))


def test_a_data_sets_folder_is_split_as_its_files_are_named(tiles: Path, tmp_path: Path) -> None:
    write_parquet(tiles, tmp_path / "data" / "train-00000-of-00002.parquet", range(8))
    write_parquet(tiles, tmp_path / "data" / "train-00001-of-00002.parquet", range(8, 16))
    write_parquet(tiles, tmp_path / "data" / "validation-00000-of-00001.parquet", range(16, 22))
    write_parquet(tiles, tmp_path / "data" / "test-00000-of-00001.parquet", range(22, 24))
    dataset = read(tmp_path, label_column="label")
    assert sorted({pair.row for pair in dataset.train.pairs}) == list(range(3, 19))  # "test" sorts first
    assert len({pair.row for pair in dataset.validation.pairs}) == 6
    assert dataset.labels == sorted(COLOURS)
    part = read(tmp_path / "data" / "train-*.parquet", validation_fraction=0.25)
    assert len({pair.row for pair in part.train.pairs}) == 12


def test_class_numbers_have_the_names_that_the_data_set_gives_them(tiles: Path, tmp_path: Path) -> None:
    file = write_parquet(tiles, tmp_path / "rows.parquet", range(6), numbered=False)
    assert read(file, label_column="label").labels == ["0", "1", "2"]
    features = {"label": {"feature": {"names": list(COLOURS), "_type": "ClassLabel"}, "_type": "List"}}
    several = pq.read_table(file).set_column(2, "label", pa.array([[0, 2], [1], [], [-1], None, [2]]))
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(several.replace_schema_metadata(described), file)
    found = {pair.row: pair.labels for pair in read(file, label_column="label").train.pairs}
    assert found == {1: ("red", "blue"), 2: ("green",), 3: (), 4: (), 5: (), 6: ("blue",)}


def test_cells_are_read_in_any_order_within_bounds(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tiles, tmp_path / "rows.parquet", range(24), group=3)
    groups = RowGroups()
    monkeypatch.setattr("cliptune_trainer.data.row_groups._MAX_KEPT_BYTES", 40_000)  # two groups or so
    for row in np.random.default_rng(0).permutation(24).tolist():
        assert groups.cell(file, "image", row) == (tiles / f"{row}.png").read_bytes()
    assert groups.kept_bytes <= 40_000
    with pytest.raises(OSError, match="has 24 rows"):
        groups.cell(file, "image", 24)


def test_an_empty_cell_and_a_damaged_image_are_named(tiles: Path, tmp_path: Path) -> None:
    good = [{"bytes": (tiles / f"{row}.png").read_bytes(), "path": None} for row in range(4)]
    images = [*good, {"bytes": None, "path": None}, {"bytes": b"no image", "path": "5.png"}]
    table = pa.table({"image": images, "caption": [f"tile {row}" for row in range(6)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    dataset = read(tmp_path / "rows.parquet", max_bad_fraction=0.5)
    assert len(dataset.train) == 4
    assert "row 5: rows.parquet, row 5: the cell is empty" in dataset.bad[0]
    assert "row 6: rows.parquet, row 6: not an image file" in dataset.bad[1]
    wordless = pa.table({"image": ["a.png", None, "b.png"], "caption": [["", None], ["a tile"], []]})
    pq.write_table(wordless, tmp_path / "wordless.parquet")
    with pytest.raises(DataError, match=r"3 of 3 rows .* row 1: wordless\.parquet, row 1: caption: the text"):
        read(tmp_path / "wordless.parquet", max_bad_fraction=0.5)


def test_parquet_that_cannot_be_used_says_why(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"none\.parquet cannot be read"):
        read(tmp_path / "none.parquet")
    file = write_parquet(tiles, tmp_path / "rows.parquet", range(6))
    with pytest.raises(MissingColumnError):
        read(file, caption_column="text")
    with pytest.raises(DataError, match="images are bytes"):
        read(file, image_column="label")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConflictError, match=r"pip install 'cliptune\[parquet\]'"):
        read(file)


def test_a_cells_name_tells_file_and_row() -> None:
    cell = ParquetCell(Path("/data/train.parquet"), "image", 6)
    assert (cell.name, str(cell)) == ("train.parquet, row 7", "/data/train.parquet/6")


# -- a job


def test_a_job_trains_on_deep_images_in_parquet_with_processes_that_decode(
    make_job: MakeJob, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    cells = []
    for row in range(24):
        pixels = random.integers(0, 900, (40, 40), dtype=np.uint16) + 1000 * (row % 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue() if row != 7 else cells[4]["bytes"], "path": None})
    table = pa.table({"image": cells, "label": [COLOURS[row % 3] for row in range(24)]})
    pq.write_table(table, tmp_path / "slices.parquet", row_group_size=8)
    data = {
        "train": str(tmp_path / "slices.parquet"),
        "label_column": "label",
        "augmentation": "none",
        "validation_fraction": 0.25,
        "caption_templates": ["a {label} slice", "slice: {label}"],
        "reading": {"window": "1500,3000"},
        "workers": 1,
    }
    job = make_job(root=tmp_path, data=data, train={"epochs": 2, "batch_size": 8})
    job.run("run", 1)
    assert job.outcome(1).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    notices = job.notices(1)
    assert notices["deep-images"].startswith(
        "24 images not of 8 bits, read with data.reading.window = '1500,3"
    )
    assert "row 8 (slices.parquet/7) is row 5 (slices.parquet/4)" in notices["duplicate-images"]
    assert not {"workers-lost", "image-unreadable", "mixed-bit-depths"} & set(notices)


# -- the guide


def test_every_example_of_the_guide_is_a_spec_that_is_obeyed() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```toml\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    assert len(examples) == 4
    for example in examples:
        parts = {"name": "guide", "model": {"name": "cliptune-test-vit"}, **tomllib.loads(example)}
        spec = json_format.ParseDict(parts, spec_pb2.JobSpec())
        validate_shape(spec)
        assert from_proto(spec).data.train == parts["data"]["train"]
