"""Three data sets, one a domain, on disk as a user has them, and what a spec says of each.

Enters: a folder with the tars medical_bccd and scientific_nuclei (`images/` and `captions.csv` each), and the
installed package elpv-dataset. Leaves: `DomainSet`s: a table of all splits, one of the test split alone, and
the least that a user writes to train on them. Used by `domains`, `temperature` and `tuning`.
"""

from __future__ import annotations

import csv
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cliptune_trainer.demo import elpv

ALL: Final = "rows.csv"
TEST: Final = "test.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a trained model is asked of each test image.

    Attributes:
        column: of the table, which holds the label.
        names: what the labels mean, in words that a user would choose before having seen a result.
    """

    column: str
    names: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """A data set: its domain, what groups its rows, what is asked. The first question is the set's own."""

    domain: str
    group: str
    questions: tuple[Question, ...]


SETS: Final[Mapping[str, About]] = {
    "medical_bccd": About(
        domain="medical",
        group="group",
        questions=(
            Question(
                column="label",
                names={
                    "field": "blood smear field with many cells",
                    "RBC": "red blood cell",
                    "WBC": "white blood cell",
                    "Platelets": "platelet",
                },
            ),
        ),
    ),
    "elpv": About(
        domain="industrial",
        group="block",
        questions=(
            Question(
                column="label",
                names={
                    f"{short} {condition}": f"{condition} {long} solar cell"
                    for short, long in elpv.TYPES.items()
                    for condition in ("functional", "defective")
                },
            ),
        ),
    ),
    "scientific_nuclei": About(
        domain="scientific",
        group="group",
        questions=(
            Question(
                column="label",
                names={
                    "fluorescence": "fluorescent nuclei on a dark background",
                    "histology": "purple stained tissue",
                    "histology_light": "pale stained tissue",
                    "brightfield": "cells in brightfield",
                },
            ),
            Question(
                column="density",
                names={count: f"{count} nuclei" for count in ("a few", "several", "many", "densely packed")},
            ),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSet:
    """A data set that lies ready in `folder`; its images are in `images`."""

    name: str
    folder: Path
    images: Path

    @property
    def about(self) -> About:
        """What it is."""
        return SETS[self.name]

    def rows(self, split: str) -> int:
        """How many rows a split has."""
        return sum(row["split"] == split for row in read_rows(self.folder / ALL))

    def spec(self) -> dict[str, Any]:
        """What a user writes who names nothing but the data: model and domain are still to come."""
        question = self.about.questions[0]
        return {
            "name": self.name.replace("_", "-"),
            "data": {
                "train": str(self.folder / ALL),
                "image_root": str(self.images),
                "label_column": question.column,
                "split_column": "split",
                "group_column": self.about.group,
            },
            "evaluation": {"label_names": dict(question.names)},
        }


def lay_ready(name: str, data: Path, home: Path, *, rows: int = 0) -> DomainSet:
    """Unpacks a set, once, into `home`/NAME.

    Args:
        name: of `SETS`.
        data: folder with the tars.
        home: where the benchmark keeps things.
        rows: of each split, an even sample; 0: all.
    """
    folder = home / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == "elpv":
        images = elpv.installed_folder()
        elpv.write_table(elpv.read_cells(images), folder / ALL)
    else:
        images = folder
        if not (folder / "images").exists():
            with tarfile.open(data / f"{name}.tar") as archive:
                archive.extractall(home, filter="data")
        shutil.copyfile(folder / "captions.csv", folder / ALL)
    found = read_rows(folder / ALL)
    if rows:
        splits = [[row for row in found if row["split"] == split] for split in ("train", "val", "test")]
        found = [row for split in splits for row in split[:: max(len(split) // rows, 1)][:rows]]
        write_rows(folder / ALL, found)
    # Without the column: every row of the file is meant.
    test = [{k: v for k, v in row.items() if k != "split"} for row in found if row["split"] == "test"]
    write_rows(folder / TEST, test)
    return DomainSet(name=name, folder=folder, images=images)


def read_rows(path: Path) -> list[dict[str, str]]:
    """A table, by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Inverse of `read_rows`, of at least one row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
