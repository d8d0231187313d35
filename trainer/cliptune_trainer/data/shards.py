"""Reading tar shards of image-caption pairs, in WebDataset's layout: NAME.jpg beside NAME.txt or NAME.json.

Enters: a ".tar", a pattern of such names, or a folder of them. Leaves: the same `Table` as from a CSV file,
its images named by where they lie in their shard. Called by `dataset`. A shard's headers are read once, its
images not at all: rows are then read in any order, so that shuffling, splitting, resuming and counting bad
rows work as they do with single files. WebDataset's own streams can do none of these exactly.

A column of the spec is a field of NAME.json, or the text of NAME.COLUMN; a caption may also be NAME.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cliptune.durable import write_atomically
from cliptune.errors import CliptuneError, DataError, MissingColumnError
from cliptune_model.tokens import check_text
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.samples import MAX_TEXT_BYTES, Sample, read_samples
from cliptune_trainer.data.shard_names import find_shards
from cliptune_trainer.data.source import ShardMember
from cliptune_trainer.data.table import SPLITS, BadRow, Pair, Table
from cliptune_trainer.spec import DataConfig


def read_shards(path: str, config: DataConfig, roots: DataRoots, cache: Path | None = None) -> Table:
    """Finds the shards and reads their headers and texts.

    Args:
        path: "a.tar", "a-{000..127}.tar", "a-*.tar" or a folder of ".tar" files.
        config: names the columns.
        roots: folders that may be read.
        cache: folder where the index is kept, for as long as the shards stay the same.

    Raises:
        DataError: there is no shard, or one is no uncompressed tar file.
        MissingColumnError: no sample has a column of the spec.
        PathOutsideRootsError: a shard lies outside the roots.
    """
    shards = find_shards(path, roots)
    fingerprint = _fingerprint(shards, config)
    index = cache / f"shards-{fingerprint[:16]}.json" if cache else None
    if index and (known := _load(index, Path(path), fingerprint, shards)):
        return known
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    columns = _Columns.of(config)
    row = 0
    for samples in read_samples(shards, columns.texts):
        for sample in samples:
            row += 1
            try:
                pairs.append(columns.pair(row, sample))
            except _UnusableSample as unusable:
                bad.append(BadRow(row=row, reason=f"{sample.label}: {unusable}"))
    if not row:
        raise DataError(f"{path} holds no samples: NAME.jpg beside NAME.txt or NAME.json", file=path)
    columns.check_found(path)
    table = Table(path=Path(path), sha256=fingerprint, pairs=tuple(pairs), bad=tuple(bad))
    if index:
        with contextlib.suppress(OSError):  # a full disk costs the next attempt a second look, no more
            _store(index, table, shards)
    return table


class _UnusableSample(Exception):  # noqa: N818 - says why, and goes no further
    """Why a sample is left out."""


@dataclass(slots=True)
class _Columns:
    """The spec's columns, and which of them any sample had."""

    caption: str
    others: dict[str, str]  # field of the spec → column
    found: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, config: DataConfig) -> _Columns:
        named = {
            "label_column": config.label_column,
            "split_column": config.split_column,
            "group_column": config.group_column,
        }
        return cls(
            caption=config.caption_column, others={name: column for name, column in named.items() if column}
        )

    @property
    def texts(self) -> frozenset[str]:
        """Extensions whose content is wanted."""
        return frozenset({"txt", "json", self.caption.lower(), *(c.lower() for c in self.others.values())})

    def pair(self, row: int, sample: Sample) -> Pair:
        if sample.damage:
            raise _UnusableSample(sample.damage)
        fields = self._fields(sample)
        self.seen |= fields.keys()
        if sample.image is None:
            raise _UnusableSample("no image")

        def value(spec_field: str) -> str:
            column = self.others.get(spec_field, "")
            if column in fields:
                self.found.add(column)
            return fields.get(column, "")

        caption = fields.get(self.caption, fields.get("txt", ""))
        label, split, group = value("label_column"), value("split_column").lower(), value("group_column")
        try:
            check_text(caption)
        except CliptuneError as error:
            raise _UnusableSample(f"caption: {error.message}") from error
        if "split_column" in self.others and split not in SPLITS:
            raise _UnusableSample(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
        return Pair(
            row=row,
            image=sample.image,
            reference=f"{sample.shard.name}/{sample.image.name}",
            caption=caption,
            label=label,
            group=group,
            split=SPLITS.get(split, ""),
        )

    def check_found(self, path: str) -> None:
        for spec_field, column in self.others.items():
            if column not in self.found:
                found = ", ".join(sorted(self.seen))
                raise MissingColumnError(
                    f"no sample of {path} has a field or a member {column!r} (data.{spec_field}); they have: "
                    f"{found}",
                    column=column,
                    found=found,
                    file=path,
                    path=f"data.{spec_field}",
                )

    def _fields(self, sample: Sample) -> dict[str, str]:
        """Column → text: members by extension, and the fields of the JSON member over them."""
        fields: dict[str, str] = {}
        for extension, content in sample.texts.items():
            if content is None:
                raise _UnusableSample(f".{extension} is longer than {MAX_TEXT_BYTES:,} bytes")
            try:
                text = content.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise _UnusableSample(f".{extension} is not UTF-8 text") from error
            if extension != "json":
                fields[extension] = text
        wanted = {self.caption, *self.others.values()}
        fields |= {column: fields[column.lower()] for column in wanted if column.lower() in fields}
        if "json" in sample.texts:
            fields |= _json_fields(sample.texts["json"] or b"")
        return fields


def _json_fields(content: bytes) -> dict[str, str]:
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _UnusableSample(f".json is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise _UnusableSample(".json is no object")
    return {
        key: str(value).strip()
        for key, value in loaded.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    }


# -- the index, kept


def _fingerprint(shards: Sequence[Path], config: DataConfig) -> str:
    """Of the shards as files: their images would take hours to read."""
    columns = (config.caption_column, config.label_column, config.split_column, config.group_column)
    digest = hashlib.sha256(json.dumps(columns).encode())
    for shard in shards:
        try:
            status = shard.stat()
        except OSError as error:
            raise DataError(f"{shard} cannot be read: {error.strerror or error}", file=shard) from error
        digest.update(f"{shard}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _store(index: Path, table: Table, shards: Sequence[Path]) -> None:
    places = {shard: place for place, shard in enumerate(shards)}
    rows = []
    for pair in table.pairs:
        image = pair.image
        if isinstance(image, ShardMember):
            where = [places[image.shard], image.name, image.offset, image.size]
            rows.append([pair.row, *where, pair.caption, pair.label, pair.group, pair.split])
    stored = {"sha256": table.sha256, "pairs": rows, "bad": [asdict(bad) for bad in table.bad]}
    write_atomically(index, json.dumps(stored, ensure_ascii=False, separators=(",", ":")).encode())


def _load(index: Path, path: Path, fingerprint: str, shards: Sequence[Path]) -> Table | None:
    try:
        stored: dict[str, Any] = json.loads(index.read_bytes())
    except (OSError, ValueError):
        return None
    if stored.get("sha256") != fingerprint:
        return None
    pairs = (
        Pair(
            row=row,
            image=ShardMember(shards[place], name, offset, size),
            reference=f"{shards[place].name}/{name}",
            caption=caption,
            label=label,
            group=group,
            split=split,
        )
        for row, place, name, offset, size, caption, label, group, split in stored["pairs"]
    )
    return Table(
        path=path,
        sha256=fingerprint,
        pairs=tuple(pairs),
        bad=tuple(BadRow(**bad) for bad in stored["bad"]),
    )
