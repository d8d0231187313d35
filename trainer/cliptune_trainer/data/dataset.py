"""A job's data, looked at once: which rows train, which validate, which cannot be used.

Enters: the data part of a spec. Leaves: a `Dataset`. Called by `prepare`, which opens every image, and by
`run`, which trusts what `prepare` found as long as the table files are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from cliptune.errors import CliptuneError, DataError
from cliptune_model.pixels import decode_image
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.shard_names import names_shards
from cliptune_trainer.data.shards import read_shards
from cliptune_trainer.data.source import ImageSource
from cliptune_trainer.data.split import split_by_column, split_by_group
from cliptune_trainer.data.table import BadRow, Pair, Table, read_table
from cliptune_trainer.spec import DataConfig

# Decoding every image of a huge table would take hours: beyond this many only an even sample is decoded, and
# the others are checked for being there.
MAX_DECODED: Final = 20_000
_LISTED: Final = 5


class Pairs:
    """Rows of one split, with the identity of each row's image and caption.

    `image_ids` and `caption_ids` are int64 [N]; equal ids mean the same file, or the same text.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = tuple(pairs)
        self.image_ids = _ids([str(pair.image) for pair in self.pairs])
        self.caption_ids = _ids([pair.caption for pair in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What examining the tables found: their fingerprints and the rows to leave out."""

    tables: dict[str, str]
    unreadable: dict[str, dict[int, str]]

    def store(self) -> dict[str, Any]:
        """As JSON values."""
        return {"tables": self.tables, "unreadable": self.unreadable}

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Findings:
        """Inverse of `store`."""
        unreadable = {
            path: {int(row): reason for row, reason in rows.items()}
            for path, rows in stored["unreadable"].items()
        }
        return cls(tables=dict(stored["tables"]), unreadable=unreadable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a job trains and validates on. `bad` lists the rows left out, as "file, row N: reason"."""

    train: Pairs
    validation: Pairs
    bad: tuple[str, ...]
    findings: Findings
    shared_images: int
    """Images that are in both splits."""

    @property
    def labels(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted({pair.label for pair in self.train.pairs + self.validation.pairs if pair.label})

    def bad_rows_message(self) -> str:
        """For one notice about all of them: how many, and the first few."""
        rest = f"; and {len(self.bad) - _LISTED} more" if len(self.bad) > _LISTED else ""
        return f"{len(self.bad)} rows cannot be used and are skipped: {'; '.join(self.bad[:_LISTED])}{rest}"


def read_dataset(
    config: DataConfig,
    roots: DataRoots,
    *,
    seed: int,
    known: Findings | None = None,
    cache: Path | None = None,
) -> Dataset:
    """Reads the tables or shards, opens the images, splits.

    Args:
        config: the data part of the spec.
        roots: folders that may be read.
        seed: of the split.
        known: what an earlier examination found; images are not opened again if the files are still the same.
        cache: folder where an index of shards is kept.

    Raises:
        DataError: a table cannot be used, or more than `max_bad_fraction` of its rows cannot.
        MissingColumnError, PathOutsideRootsError: see `read_table` and `read_shards`.
    """
    tables = [
        read_shards(path, config, roots, cache)
        if names_shards(path, roots)
        else read_table(path, config, roots)
        for path in (config.train, config.validation)
        if path
    ]
    fingerprints = {str(table.path): table.sha256 for table in tables}
    if known is None or known.tables != fingerprints:
        known = Findings(
            tables=fingerprints, unreadable={str(table.path): _unreadable_images(table) for table in tables}
        )
    bad: list[str] = []
    usable: list[list[Pair]] = []
    for table in tables:
        unreadable = known.unreadable[str(table.path)]
        skipped = [*table.bad, *(BadRow(row=row, reason=reason) for row, reason in unreadable.items())]
        _check_share(table, skipped, config.max_bad_fraction)
        skipped.sort(key=lambda bad_row: bad_row.row)
        bad += [f"{table.path.name}, row {bad_row.row}: {bad_row.reason}" for bad_row in skipped]
        usable.append([pair for pair in table.pairs if pair.row not in unreadable])
    if config.validation:
        train, validation = usable
        if config.split_column:
            train = split_by_column(train)[0]
    elif config.split_column:
        train, validation = split_by_column(usable[0])
    else:
        train, validation = split_by_group(usable[0], config.validation_fraction, seed)
    if len(train) < 2:
        raise DataError(
            f"{tables[0].path} has {len(train)} rows to train on; 2 are needed", file=tables[0].path
        )
    shared = {pair.image for pair in train} & {pair.image for pair in validation}
    return Dataset(
        train=Pairs(train),
        validation=Pairs(validation),
        bad=tuple(bad),
        findings=known,
        shared_images=len(shared),
    )


def load_findings(path: Path) -> Findings | None:
    """What `prepare` stored, or None."""
    return Findings.load(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _unreadable_images(table: Table) -> dict[int, str]:
    """Row → why its image cannot be read."""
    images = list(dict.fromkeys(pair.image for pair in table.pairs))
    every = max(len(images) // MAX_DECODED, 1)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        reasons = pool.map(_why_unreadable, images, [place % every == 0 for place in range(len(images))])
    unreadable = {image: reason for image, reason in zip(images, reasons, strict=True) if reason}
    return {pair.row: unreadable[pair.image] for pair in table.pairs if pair.image in unreadable}


def _why_unreadable(image: ImageSource, decode: bool) -> str:
    try:
        if decode:
            decode_image(image.read_bytes())
        elif isinstance(image, Path):
            image.stat()
    except OSError as error:
        return f"{image.name}: {error.strerror or error}"
    except CliptuneError as error:
        return f"{image.name}: {error.message}"
    return ""


def _check_share(table: Table, skipped: list[BadRow], allowed: float) -> None:
    rows = len(table.pairs) + len(table.bad)
    if len(skipped) > allowed * rows:
        first = min(skipped, key=lambda bad_row: bad_row.row)
        raise DataError(
            f"{len(skipped)} of {rows} rows of {table.path} cannot be used, more than "
            f"data.max_bad_fraction = {allowed:g} allows; the first is row {first.row}: {first.reason}",
            file=table.path,
            row=first.row,
            bad_rows=len(skipped),
            rows=rows,
        )


def _ids(values: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    known: dict[str, int] = {}
    return np.fromiter(
        (known.setdefault(value, len(known)) for value in values), dtype=np.int64, count=len(values)
    )
