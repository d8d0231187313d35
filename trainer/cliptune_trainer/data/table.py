"""What is known of a data set's rows, whatever form it has.

Leaves each reader: one `Table` for each file, folder or set of shards that a spec names. Enters `dataset`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cliptune_trainer.data.source import ImageSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An image with one caption. A row with several captions is several pairs.

    Attributes:
        row: 1 is the first of a table (after the header), the first line of JSON lines, the first image.
        image: where its bytes are.
        reference: the image as the data set names it.
        caption: its text; of a row without one, the first of `variants`.
        labels: of the image, in the order in which it names them.
        group: its rows never part when a split is made. "": none.
        split: "train", "val" or "test", where the data says so.
        variants: captions of which one is drawn each time: of a row without one, from its labels.
        original: of an image whose content is also there under an earlier name: that name.
    """

    row: int
    image: ImageSource
    reference: str
    caption: str
    labels: tuple[str, ...] = ()
    group: str = ""
    split: str = ""
    variants: tuple[str, ...] = ()
    original: str = ""

    @property
    def label(self) -> str:
        """The first of its labels, or ""."""
        return self.labels[0] if self.labels else ""

    @property
    def identity(self) -> str:
        """Pairs of one identity show the same image."""
        return self.original or str(self.image)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    row: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The rows of one file, folder or set of shards, in their order.

    Attributes:
        path: what the spec names.
        sha256: tells whether it is still what was looked at before.
        pairs: the usable rows.
        bad: the others.
        names_split: the data itself says which rows train: in the split column, or by the names of folders or
            files.
    """

    path: Path
    sha256: str
    pairs: tuple[Pair, ...]
    bad: tuple[BadRow, ...] = field(default=())
    names_split: bool = False

    @property
    def rows(self) -> int:
        """Usable or not; a row with several captions is one."""
        return len({pair.row for pair in self.pairs}) + len(self.bad)
