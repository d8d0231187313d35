"""Reading a CSV or TSV file of image-caption pairs.

Enters: a file and the names of its columns. Leaves: one `Pair` a usable row and one `BadRow` for each other.
Called by `dataset`. Images are named here, not opened.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cliptune.errors import CliptuneError, DataError, MissingColumnError
from cliptune_model.tokens import check_text
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.source import ImageSource
from cliptune_trainer.spec import DataConfig

SPLITS: Final = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A usable row. `row` 1 is the first after the header; `reference` is the image as the table has it."""

    row: int
    image: ImageSource
    reference: str
    caption: str
    label: str = ""
    group: str = ""
    split: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    row: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A file's rows. `sha256` is of its bytes: whether it is still the file that was looked at before."""

    path: Path
    sha256: str
    pairs: tuple[Pair, ...]
    bad: tuple[BadRow, ...] = field(default=())


def read_table(path: str, config: DataConfig, roots: DataRoots) -> Table:
    """Reads and checks every row.

    Raises:
        DataError: the file cannot be read, is not text, or has no rows.
        MissingColumnError: a column of the spec is not in the header.
        PathOutsideRootsError: the file, or an image in it, lies outside the roots.
    """
    file = roots.table(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}", file=file) from error
    text = _decode(content, file)
    rows = _rows(text, "\t" if file.suffix.lower() in (".tsv", ".tab") else ",")
    _, header = next(rows, (0, []))
    if isinstance(header, csv.Error) or not header:
        raise DataError(f"{file} has no header row", file=file)
    columns = _Columns.find(header, config, file)
    image_root = roots.checked(Path(config.image_root)) if config.image_root else file.parent
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    for row, fields in rows:
        if isinstance(fields, csv.Error):
            bad.append(BadRow(row=row, reason=str(fields)))
            continue
        try:
            pairs.append(columns.pair(row, fields, image_root, roots))
        except _UnusableRow as unusable:
            bad.append(BadRow(row=row, reason=str(unusable)))
    if not pairs and not bad:
        raise DataError(f"{file} has no rows after its header", file=file)
    return Table(path=file, sha256=hashlib.sha256(content).hexdigest(), pairs=tuple(pairs), bad=tuple(bad))


class _UnusableRow(Exception):  # noqa: N818 - says why, and goes no further
    """Why a row is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """Places of the columns in a row; -1 for one that the spec does not name."""

    width: int
    image: int
    caption: int
    label: int
    split: int
    group: int

    @classmethod
    def find(cls, header: list[str], config: DataConfig, file: Path) -> _Columns:
        found = [name.strip() for name in header]

        def place(spec_field: str, name: str) -> int:
            if not name:
                return -1
            if name not in found:
                raise MissingColumnError(
                    f"{file} has no column {name!r} (data.{spec_field}); it has: {', '.join(found)}",
                    column=name,
                    found=", ".join(found),
                    file=file,
                    path=f"data.{spec_field}",
                )
            return found.index(name)

        return cls(
            width=len(found),
            image=place("image_column", config.image_column),
            caption=place("caption_column", config.caption_column),
            label=place("label_column", config.label_column),
            split=place("split_column", config.split_column),
            group=place("group_column", config.group_column),
        )

    def pair(self, row: int, fields: list[str], image_root: Path, roots: DataRoots) -> Pair:
        if len(fields) != self.width:
            raise _UnusableRow(f"{len(fields)} fields under {self.width} columns")

        def value(place: int) -> str:
            return fields[place].strip() if place >= 0 else ""

        if any("\ufffd" in entry or "\0" in entry for entry in fields):
            raise _UnusableRow("not UTF-8 text")
        image, caption, split = value(self.image), value(self.caption), value(self.split).lower()
        if not image:
            raise _UnusableRow("no image")
        try:
            check_text(caption)
        except CliptuneError as error:
            raise _UnusableRow(f"caption: {error.message}") from error
        if self.split >= 0 and split not in SPLITS:
            raise _UnusableRow(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
        return Pair(
            row=row,
            image=roots.checked(image_root / image),
            reference=image,
            caption=caption,
            label=value(self.label),
            group=value(self.group),
            split=SPLITS.get(split, ""),
        )


def _decode(content: bytes, file: Path) -> str:
    """Text of the file. A stray bad byte becomes U+FFFD, so that it costs its own row only."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{file} is UTF-16; save it as UTF-8", file=file)
    if b"\0" in content[:4096]:
        raise DataError(
            f"{file} is not a text file; a CSV or TSV file with a header row is needed", file=file
        )
    return content.decode("utf-8-sig", errors="replace")


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The header as row 0, then each non-empty row with its number, or with what is wrong with it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    row = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield row, error
            row += 1
            continue
        if fields:
            yield row, fields
            row += 1
