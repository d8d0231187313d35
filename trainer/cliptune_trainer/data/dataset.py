"""A job's data, looked at once: which rows train, which validate, which cannot be used.

Enters: the data part of a spec. Leaves: a `Dataset`. Called by `prepare`, which opens every image, and by
`run`, which trusts what `prepare` found as long as the data are the same.

N: pairs of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cliptune.errors import DataError
from cliptune_trainer.data.duplicates import join_duplicates
from cliptune_trainer.data.findings import Findings, examine, fingerprints
from cliptune_trainer.data.forms.columns import Wording
from cliptune_trainer.data.forms.reader import read_table
from cliptune_trainer.data.leaks import find_leaks, refuse_leaks
from cliptune_trainer.data.listing import counted, listed, rows_listed
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.split import split_by_group, split_by_name
from cliptune_trainer.data.table import BadRow, Pair, Table
from cliptune_trainer.image.reading import Reading
from cliptune_trainer.spec import DataConfig

_PLAIN: Final = Wording()


class Pairs:
    """Rows of one split, with the identity of each row's image and caption.

    `image_ids` and `caption_ids` are int64 [N]; equal ids mean the same image, or the same text (of captions
    drawn from templates, the same labels).

    Args:
        pairs: the rows.
        labels: all of the data set, sorted. Default: those of the rows.
        reading: how their images are read.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, labels: Sequence[str] | None = None, reading: Reading | None = None
    ) -> None:
        self.pairs = tuple(pairs)
        self.reading = reading or Reading()
        self.labels = tuple(_labels(self.pairs) if labels is None else labels)
        self.image_ids = _ids([pair.identity for pair in self.pairs])
        self.caption_ids = _ids([pair.caption for pair in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a job trains and validates on.

    Attributes:
        train, validation: the splits.
        bad: the rows left out, as "file, row N: reason".
        findings: what opening the images found.
        copies: of images that repeat others under another name; "" when there are none.
        leaks: groups and images that are in both splits, with their rows.
    """

    train: Pairs
    validation: Pairs
    bad: tuple[str, ...]
    findings: Findings
    copies: str
    leaks: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The distinct labels, sorted."""
        return list(self.train.labels)

    def bad_rows_message(self) -> str:
        """For one notice about all of them: how many, and the first few."""
        return f"{counted(len(self.bad), 'row')} cannot be used, skipped: {listed(self.bad)}"


def read_dataset(
    config: DataConfig,
    roots: DataRoots,
    *,
    seed: int,
    wording: Wording = _PLAIN,
    known: Findings | None = None,
    cache: Path | None = None,
) -> Dataset:
    """Reads the rows, opens the images, splits.

    Args:
        config: the data part of the spec.
        roots: folders that may be read.
        seed: of the split.
        wording: of captions made from labels.
        known: what an earlier examination found; images are not opened again if the files are still the same.
        cache: folder where an index of shards is kept.

    Raises:
        DataError: a table cannot be used, more than `max_bad_fraction` of its rows cannot, fewer than two
            rows train, all have one caption, or the spec refuses duplicates or leaks that are there.
        MissingColumnError, PathOutsideRootsError, ConflictError: see `read_table`.
    """
    tables = [
        read_table(path, config, roots, wording=wording, cache=cache)
        for path in (config.train, config.validation)
        if path
    ]
    if known is None or known.tables != fingerprints(tables):
        known = examine(tables, config.reading)
    bad: list[str] = []
    for table in tables:
        unreadable = known.unreadable[str(table.path)]
        skipped = [*table.bad, *(BadRow(row=row, reason=reason) for row, reason in unreadable.items())]
        _check_share(table, skipped, config.max_bad_fraction)
        skipped.sort(key=lambda bad_row: bad_row.row)
        bad += [f"{table.path.name}, row {bad_row.row}: {bad_row.reason}" for bad_row in skipped]
    joined = join_duplicates(tables, known, config.duplicates)
    train, validation = _split(config, tables, joined.pairs, seed)
    _check_training_rows(train, tables[0])
    leaks = find_leaks(train, validation)
    refuse_leaks(leaks, config.leakage)
    labels = _labels([*train, *validation])
    return Dataset(
        train=Pairs(train, labels=labels, reading=config.reading),
        validation=Pairs(validation, labels=labels, reading=config.reading),
        bad=tuple(bad),
        findings=known,
        copies=joined.message(),
        leaks=tuple(leaks),
    )


def _split(
    config: DataConfig, tables: Sequence[Table], usable: Sequence[list[Pair]], seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Training and validation rows: as the spec says, or the data's own names, or a share of the groups."""
    rows, named = usable[0], tables[0].names_split
    if config.validation:
        return (split_by_name(rows)[0] if named else rows), usable[1]
    if named:
        train, validation = split_by_name(rows)
        # Folders and files named "train" and "test" alone leave nothing to look at while training.
        if validation or config.split_column:
            return train, validation
        rows = train
    return split_by_group(rows, config.validation_fraction, seed)


def _check_training_rows(train: Sequence[Pair], table: Table) -> None:
    if len(train) < 2:
        raise DataError(f"{table.path} has {len(train)} rows to train on; 2 are needed", file=table.path)
    if len({pair.caption for pair in train}) == 1:
        rows = rows_listed(list(dict.fromkeys(pair.row for pair in train)))
        raise DataError(
            f"all {len(train)} rows to train on have the same caption, {train[0].caption!r} ({rows} of"
            f" {table.path}): there is nothing to tell images apart by",
            file=table.path,
            row=train[0].row,
        )


def _check_share(table: Table, skipped: list[BadRow], allowed: float) -> None:
    rows = table.rows
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


def _labels(pairs: Sequence[Pair]) -> list[str]:
    return sorted({label for pair in pairs for label in pair.labels})


def _ids(values: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    known: dict[str, int] = {}
    return np.fromiter(
        (known.setdefault(value, len(known)) for value in values), dtype=np.int64, count=len(values)
    )
