"""Small real data sets in a folder: images on disk and the CSV that names them.

`write_shapes` draws every colour × shape in turn with captions and labels; `write_csv` writes any rows, so
that a test can break one. Called by tests of data loading, training and the daemon.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import images


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """A written data set. Columns: image, caption, label (the shape), colour, split, module (the group)."""

    folder: Path
    csv: Path
    rows: tuple[Mapping[str, str], ...]

    @property
    def labels(self) -> list[str]:
        """Distinct labels, sorted."""
        return sorted({row["label"] for row in self.rows})


def write_shapes(
    folder: Path,
    *,
    rows: int = 24,
    size: int = 32,
    seed: int = 0,
    colours: Sequence[str] = tuple(images.COLOURS),
    shapes: Sequence[str] = images.SHAPES,
) -> Shapes:
    """Draw `rows` images (PNG and JPEG by turns) under folder/images and write folder/data.csv.

    Every fourth row is of split "val", the others of "train"; three rows in a row share a module.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    written: list[dict[str, str]] = []
    kinds = itertools.cycle(itertools.product(colours, shapes))
    for number, (colour, shape) in zip(range(rows), kinds, strict=False):
        suffix, form = (".png", "PNG") if number % 2 == 0 else (".jpg", "JPEG")
        path = folder / "images" / f"{number:04d}-{colour}-{shape}{suffix}"
        path.write_bytes(images.encoded(images.draw(colour, shape, size=size, seed=seed + number), form))
        written.append(
            {
                "image": str(path.relative_to(folder)),
                "caption": images.caption(colour, shape),
                "label": shape,
                "colour": colour,
                "split": "val" if number % 4 == 3 else "train",
                "module": f"m{number // 3}",
            }
        )
    return Shapes(folder=folder, csv=write_csv(folder / "data.csv", written), rows=tuple(written))


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write rows with a header of the first row's keys; a ".tsv" path gets tabs. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, fieldnames=list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(rows)
    return path
