"""Reading a CSV or TSV file of image-caption pairs.

Enters: a file and the names of its columns. Leaves: a `Table`. Called by `forms`. Images are named here, not
opened.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

from cliptune.errors import DataError
from cliptune_trainer.data.forms.columns import Columns, UnusableRow
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.table import BadRow, Pair, Table
from cliptune_trainer.spec import DataConfig


def read_delimited(path: str, config: DataConfig, columns: Columns, roots: DataRoots) -> Table:
    """Reads and checks every row.

    Raises:
        DataError: the file cannot be read, is not text, or has no rows.
        MissingColumnError: a column of the spec is not in the header.
        PathOutsideRootsError: the file, or an image in it, lies outside the roots.
    """
    file = roots.table(path)
    content = read_file(file)
    text = _decode(content, file)
    rows = _rows(text, "\t" if file.suffix.lower() in (".tsv", ".tab") else ",")
    _, header = next(rows, (0, []))
    if isinstance(header, csv.Error) or not header:
        raise DataError(f"{file} has no header row", file=file)
    names = [name.strip() for name in header]
    columns.check(names, file)
    image_root = roots.checked(Path(config.image_root)) if config.image_root else file.parent
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    for row, fields in rows:
        if isinstance(fields, csv.Error):
            bad.append(BadRow(row=row, reason=str(fields)))
            continue
        try:
            if len(fields) != len(names):
                raise UnusableRow(f"{len(fields)} fields under {len(names)} columns")
            by_name = dict(zip(names, fields, strict=True))
            image = by_name[config.image_column].strip()
            if not image:
                raise UnusableRow("no image")
            pairs += columns.pairs(row, roots.checked(image_root / image), image, by_name)
        except UnusableRow as unusable:
            bad.append(BadRow(row=row, reason=str(unusable)))
    if not pairs and not bad:
        raise DataError(f"{file} has no rows after its header", file=file)
    return Table(
        path=file,
        sha256=hashlib.sha256(content).hexdigest(),
        pairs=tuple(pairs),
        bad=tuple(bad),
        names_split=bool(config.split_column),
    )


def read_file(file: Path) -> bytes:
    """A table's bytes. Raises DataError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}", file=file) from error


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
