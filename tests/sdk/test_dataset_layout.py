"""What a data set may be made of: the rules that client and daemon share, and a folder turned into a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cliptune.dataset_layout import choose_entry, content_sha256, matching
from cliptune.errors import CliptuneError, DataError, InvalidInputError, MissingColumnError
from cliptune.spec import load_spec
from cliptune.upload import Transfer, plan_upload
from cliptune.v1 import data_pb2

PATHS = ["s/000.tar", "s/001.tar", "s/012.tar", "s/readme.md", "val.tar", "captions.csv", "x/more.tsv"]

MATCHES: dict[str, list[str]] = {
    "": PATHS,
    "s": PATHS[:4],
    "s/001.tar": ["s/001.tar"],
    "s/*.tar": PATHS[:3],
    "s/{000..012}.tar": PATHS[:3],
    "s/0?2.tar": ["s/012.tar"],
    "{s/001,val}.tar": ["s/001.tar", "val.tar"],
    "*.tar": ["val.tar"],
    "s/00": [],
}


@pytest.mark.parametrize("entry", MATCHES)
def test_an_entry_means_a_file_a_folder_or_a_pattern(entry: str) -> None:
    assert matching(PATHS, entry) == MATCHES[entry]


def test_without_an_entry_the_only_table_counts_or_the_only_outer_one_or_all_files() -> None:
    assert choose_entry(["a/b.jsonl", "a/1.png"], "") == "a/b.jsonl"
    assert choose_entry(PATHS, "") == "captions.csv"
    assert choose_entry(["cat/1.png", "dog/2.png"], "") == ""
    with pytest.raises(DataError, match=r"several tables: train\.csv, val\.csv; name one"):
        choose_entry(["train.csv", "val.csv", "1.png"], "")


def test_the_checksum_of_a_data_set_does_not_depend_on_the_order_of_its_files() -> None:
    files = [data_pb2.DataFile(path=path, bytes=3, sha256=path.encode() * 4) for path in ("b", "a", "c")]
    assert content_sha256(files) == content_sha256(sorted(files, key=lambda file: file.path))
    files[0].bytes = 4
    assert content_sha256(files) != content_sha256(files[1:])


def plan(path: Path, **fields: Any) -> Any:
    told = {"name": "", "entry": "", "image_column": "image", "told": lambda what, done, total: None}
    return plan_upload(path, **{**told, **fields})


def write(folder: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_of_a_folder_every_file_counts_but_hidden_ones_and_links_to_files_are_followed(
    tmp_path: Path,
) -> None:
    folder = write(
        tmp_path / "cells",
        {"t.csv": "image\n", "a/1.png": "x", ".DS_Store": "", ".git/config": "", "a/.hidden": ""},
    )
    (folder / "a" / "2.png").symlink_to(folder / "a" / "1.png")
    made = plan(folder)
    assert (made.name, made.entry, made.bytes) == ("cells", "t.csv", 8)
    assert [file.path for file in made.files] == ["a/1.png", "a/2.png", "t.csv"]
    assert made.files[0].sha256 == made.files[1].sha256
    (folder / "b").symlink_to(folder / "a")
    with pytest.raises(InvalidInputError, match="is a link to a folder"):
        plan(folder)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_of_a_table_the_images_that_it_names_come_along(tmp_path: Path, kind: str) -> None:
    rows = ["p/1.png", "p/2.png", "p/missing.png", "p/1.png", ""]
    text = "text,scan\n" + "".join(f"a cell,{row}\n" for row in rows)
    if kind == "tsv":
        text = text.replace(",", "\t")
    if kind == "jsonl":
        text = "".join(json.dumps({"text": "a cell", "scan": row or None}) + "\n" for row in rows)
    write(tmp_path, {f"cells.{kind}": text, "p/1.png": "1", "p/2.png": "2", "p/other.png": "not named"})
    made = plan(tmp_path / f"cells.{kind}", image_column="scan")
    assert (made.name, made.entry) == ("cells", f"cells.{kind}")
    assert [file.path for file in made.files] == [f"cells.{kind}", "p/1.png", "p/2.png"]


WRONG: list[tuple[dict[str, str], str, dict[str, str], type[CliptuneError], str]] = [
    ({}, "nowhere", {}, InvalidInputError, "nowhere cannot be read: No such file"),
    ({"empty/.hidden": ""}, "empty", {}, InvalidInputError, "there is no file in"),
    ({"d/1.png": ""}, "d", {"name": "my cells"}, InvalidInputError, "'my cells' is no name"),
    ({"d/1.png": ""}, "d", {"entry": "t.csv"}, DataError, r"has no t\.csv; it has 1\.png"),
    ({"t.csv": "picture\n1.png\n"}, "t.csv", {}, MissingColumnError, "no column 'image'; it has picture"),
    ({"t.csv": "image\n../1.png\n", "1.png": ""}, "t.csv", {}, DataError, "row 1 of .* is not below"),
    ({"t.csv": "image\n/etc/hostname\n"}, "t.csv", {}, DataError, "row 1 of .* is not below"),
    ({"t.csv": "image\n1.png\n2.png\n"}, "t.csv", {}, DataError, "none of the 2 images"),
    ({"t.jsonl": "[1\n"}, "t.jsonl", {}, DataError, "is no such table"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_cannot_be_uploaded_is_told_before_anything_is_sent(tmp_path: Path, number: int) -> None:
    files, path, fields, kind, reason = WRONG[number]
    write(tmp_path, files)
    with pytest.raises(kind, match=reason):
        plan(tmp_path / path, **fields)


def test_a_file_that_became_shorter_meanwhile_ends_the_transfer_with_its_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {"a.png": "x" * 100})
    transfer = Transfer(plan(folder), reconnect_s=1, told=lambda what, done, total: None)
    (folder / "a.png").write_text("x" * 60)
    begun = data_pb2.BeginUploadResponse(upload_id="u", held_bytes=[20])
    assert [(m.file, m.offset, len(m.chunk)) for m in transfer.requests(begun)] == [(0, 20, 40)]
    with pytest.raises(InvalidInputError, match=r"a\.png became shorter"):
        transfer.check()


def test_relative_patterns_that_mean_something_beside_the_spec_become_absolute(tmp_path: Path) -> None:
    write(tmp_path, {"s/000.tar": "", "spec.toml": 'name = "x"\n[model]\nname = "cliptune-test-vit"\n'})
    for given, placed in (
        ("s/{000..009}.tar", f"{tmp_path}/s/{{000..009}}.tar"),
        ("s/*.tar", f"{tmp_path}/s/*.tar"),
        ("t/*.tar", "t/*.tar"),
        ("dataset:s", "dataset:s"),
    ):
        assert load_spec(tmp_path / "spec.toml", [f'data.train="{given}"']).data.train == placed
