"""Image-caption pairs from the ELPV data set of solar cells, for the demo and for benchmarks.

Enters: the installed package `elpv-dataset` (2,624 electroluminescence images, CC BY-NC-SA 4.0; Deitsch
et al. 2019, 2021; Buerhop-Lutz et al. 2018). Leaves: one CSV: image, caption, label, split, block. The
images stay where pip put them: nothing is copied and nothing is redistributed.

Neighbouring cells were cut from one module, so a random split would test on modules that training saw. Rows
are therefore split by blocks: runs of 60 cells of one type, which is the size of the modules wherever the
order of the file shows it. Module borders are not in the data: a few modules may have cells in two blocks.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cliptune.errors import DataError

PACKAGE: Final = "elpv_dataset"
LICENCE: Final = "CC BY-NC-SA 4.0: non-commercial use only (ELPV data set, Deitsch et al. 2019)"

CELLS_PER_BLOCK: Final = 60
# A period of six blocks: four train, one validates, one tests.
SPLIT_OF_BLOCK: Final = ("train", "train", "val", "train", "train", "test")

TYPES: Final = {"mono": "monocrystalline", "poly": "polycrystalline"}
# Defect probability in thirds → what an annotator would say.
CONDITIONS: Final = ("functional", "probably functional", "probably defective", "defective")
TEMPLATES: Final = (
    "an electroluminescence image of a {condition} {type} solar cell",
    "a {type} solar cell that is {condition}",
    "{condition} {type} photovoltaic cell under electroluminescence",
    "EL inspection of a {type} cell: {condition}",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One row: an image with what is known of it."""

    image: str
    type: str
    defect_thirds: int
    index: int
    block: int

    @property
    def split(self) -> str:
        """ "train", "val" or "test"."""
        return SPLIT_OF_BLOCK[self.block % len(SPLIT_OF_BLOCK)]

    @property
    def label(self) -> str:
        """One of four classes: the cell's type and whether a defect is more likely than not."""
        return f"{self.type} {'defective' if self.defect_thirds >= 2 else 'functional'}"

    @property
    def caption(self) -> str:
        """Training rows take the templates in turn; others the first, so that like cells match."""
        template = TEMPLATES[self.index % len(TEMPLATES)] if self.split == "train" else TEMPLATES[0]
        return template.format(condition=CONDITIONS[self.defect_thirds], type=TYPES[self.type])


def installed_folder() -> Path:
    """Folder that the package's `images/cellNNNN.png` are relative to.

    Raises:
        DataError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(f"the ELPV data set is not installed: pip install 'cliptune[demo]'. {LICENCE}")
    return Path(spec.origin).parent / "data"


def read_cells(folder: Path) -> list[Cell]:
    """Every cell of `folder`/labels.csv, in the file's order (which follows the modules)."""
    cells: list[Cell] = []
    block, block_type, block_size = -1, "", 0
    for index, line in enumerate((folder / "labels.csv").read_text(encoding="utf-8").splitlines()):
        image, probability, cell_type = line.split()
        if cell_type != block_type or block_size == CELLS_PER_BLOCK:
            block, block_type, block_size = block + 1, cell_type, 0
        block_size += 1
        thirds = round(float(probability) * 3)
        cells.append(Cell(image=image, type=cell_type, defect_thirds=thirds, index=index, block=block))
    return cells


def write_table(cells: list[Cell], path: Path) -> None:
    """The cells as a CSV that a job spec's `data.train` can name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "label", "split", "block"])
        writer.writerows([cell.image, cell.caption, cell.label, cell.split, cell.block] for cell in cells)


def class_prompts() -> dict[str, list[str]]:
    """Prompts of the four classes: every template with each wording of the class."""
    wordings = {"functional": CONDITIONS[:2], "defective": CONDITIONS[2:]}
    return {
        f"{short} {name}": [t.format(condition=c, type=long) for t in TEMPLATES for c in conditions]
        for short, long in TYPES.items()
        for name, conditions in wordings.items()
    }
