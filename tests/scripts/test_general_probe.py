"""The general probe that is shipped: which pictures it is made of, and that it is the same each time."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cliptune.embedded import MANIFEST, PROBE_FOLDER, PROBE_PAIRS, SUMS
from scripts.mini import probe

FIELDS = ["image", "caption", "label", "split", "group", "origin"]
FREE, OTHER = probe.ORIGINS[0], "@iconify-json/fluent-emoji-flat"
ROWS = [
    ("b.webp", "a frog, animal", "animals", "val", "frog", FREE),
    ("a.webp", "a drawing of frog", "animals", "val", "frog", FREE),
    ("c.webp", "a bee", "animals", "test", "bee", FREE),
    ("d.webp", "a cow", "animals", "train", "cow", FREE),
    ("e.webp", "a dog", "animals", "val", "dog", OTHER),
    ("f.webp", "an icon", "computer", "val", "icon", FREE),
    ("g.webp", "spain, flag", "symbols", "val", "spain", FREE),
    ("h.webp", "gram&amp;pa", "people", "val", "grandpa", FREE),
    ("i.webp", "a cat", "animals", "val", "cat", probe.ORIGINS[1]),
]


@pytest.fixture
def clipart(tmp_path: Path) -> Path:
    folder = tmp_path / "general_clipart"
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([FIELDS, *ROWS])
    for name, *_ in ROWS:
        (folder / name).write_bytes(name.encode())
    return folder


def test_it_is_of_held_out_free_pictures_one_of_each_concept(clipart: Path) -> None:
    with (clipart / "captions.csv").open(newline="") as file:
        assert [row["image"] for row in probe.chosen(csv.DictReader(file))] == ["a.webp", "i.webp"]


def test_it_is_written_with_its_card_and_checksums_and_the_same_each_time(
    clipart: Path, tmp_path: Path
) -> None:
    target = tmp_path / "package"
    (target / "cliptune-mini").mkdir(parents=True)
    (target / "cliptune-mini" / MANIFEST).write_text("{}")
    probe.run(clipart, target)
    shard = target / PROBE_FOLDER / PROBE_PAIRS
    first = shard.read_bytes()
    probe.run(clipart, target)
    assert shard.read_bytes() == first
    listed = [line.split("  ")[1] for line in (target / SUMS).read_text().splitlines()]
    assert listed == [
        f"cliptune-mini/{MANIFEST}",
        f"{PROBE_FOLDER}/README.md",
        f"{PROBE_FOLDER}/{PROBE_PAIRS}",
    ]
