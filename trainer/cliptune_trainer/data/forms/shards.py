"""Reading tar shards of image-caption pairs, in WebDataset's layout: NAME.jpg beside NAME.txt or NAME.json.

Enters: a ".tar", a pattern of such names, or a folder of them. Leaves: the same `Table` as from a CSV file,
its images named by where they lie in their shard. Called by `forms`. A shard's headers are read once, its
images not at all: rows are then read in any order, so that shuffling, splitting, resuming and counting bad
rows work as they do with single files. WebDataset's own streams can do none of these exactly.

A column of the spec is a field of NAME.json, or the text of NAME.COLUMN; a caption may also be NAME.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cliptune.durable import write_atomically
from cliptune.errors import DataError
from cliptune_trainer.data.forms.columns import Columns, UnusableRow, Value
from cliptune_trainer.data.forms.file_names import find_files
from cliptune_trainer.data.forms.json_lines import json_fields
from cliptune_trainer.data.forms.samples import MAX_TEXT_BYTES, Sample, read_samples
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.source import ShardMember
from cliptune_trainer.data.table import BadRow, Pair, Table
from cliptune_trainer.spec import DataConfig


def read_shards(
    path: str, config: DataConfig, columns: Columns, roots: DataRoots, cache: Path | None = None
) -> Table:
    """Finds the shards and reads their headers and texts.

    Args:
        path: "a.tar", "a-{000..127}.tar", "a-*.tar" or a folder of ".tar" files.
        config, columns: name the columns.
        roots: folders that may be read.
        cache: folder where the index is kept, for as long as the shards stay the same.

    Raises:
        DataError: there is no shard, or one is no uncompressed tar file.
        MissingColumnError: no sample has a column of the spec.
        PathOutsideRootsError: a shard lies outside the roots.
    """
    shards = find_files(path, ".tar", roots)
    fingerprint = _fingerprint(shards, config, columns)
    index = cache / f"shards-{fingerprint[:16]}.json" if cache else None
    if index and (known := _load(index, Path(path), fingerprint, shards, config)):
        return known
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    texts = _Texts(config, columns)
    row = 0
    for samples in read_samples(shards, texts.extensions):
        for sample in samples:
            row += 1
            try:
                pairs += texts.pairs(row, sample, columns)
            except UnusableRow as unusable:
                bad.append(BadRow(row=row, reason=f"{sample.label}: {unusable}"))
    if not row:
        raise DataError(f"{path} holds no samples: NAME.jpg beside NAME.txt or NAME.json", file=path)
    columns.check_seen(path, image=False)
    table = Table(
        path=Path(path),
        sha256=fingerprint,
        pairs=tuple(pairs),
        bad=tuple(bad),
        names_split=bool(config.split_column),
    )
    if index:
        with contextlib.suppress(OSError):  # a full disk costs the next attempt a second look, no more
            _store(index, table, shards)
    return table


class _Texts:
    """What the members of a sample say, by the spec's columns."""

    def __init__(self, config: DataConfig, columns: Columns) -> None:
        self._caption = config.caption_column
        self._wanted = {self._caption, *columns.wanted.values()}

    @property
    def extensions(self) -> frozenset[str]:
        """Extensions whose content is wanted."""
        return frozenset({"txt", "json", *(column.lower() for column in self._wanted)})

    def fields(self, sample: Sample) -> dict[str, Value]:
        """Column → text: members by extension, and the fields of the JSON member over them."""
        fields: dict[str, Value] = {}
        for extension, content in sample.texts.items():
            if content is None:
                raise UnusableRow(f".{extension} is longer than {MAX_TEXT_BYTES:,} bytes")
            try:
                text = content.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UnusableRow(f".{extension} is not UTF-8 text") from error
            if extension != "json":
                fields[extension] = text
        fields |= {column: fields[column.lower()] for column in self._wanted if column.lower() in fields}
        if "json" in sample.texts:
            try:
                fields |= json_fields(sample.texts["json"] or b"")
            except UnusableRow as unusable:
                raise UnusableRow(f".json is {unusable}") from unusable
        return fields

    def pairs(self, row: int, sample: Sample, columns: Columns) -> list[Pair]:
        if sample.damage:
            raise UnusableRow(sample.damage)
        fields = self.fields(sample)
        columns.note(fields)
        if sample.image is None:
            raise UnusableRow("no image")
        if "txt" in fields:
            fields.setdefault(self._caption, fields["txt"])
        return columns.pairs(row, sample.image, f"{sample.shard.name}/{sample.image.name}", fields)


# -- the index, kept


def _fingerprint(shards: Sequence[Path], config: DataConfig, columns: Columns) -> str:
    """Of the shards as files: their images would take hours to read."""
    digest = hashlib.sha256(f"{config.split_column}\n{columns.fingerprint}\n".encode())
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
            rows.append([pair.row, *where, pair.caption, pair.labels, pair.group, pair.split, pair.variants])
    stored = {"sha256": table.sha256, "pairs": rows, "bad": [asdict(bad) for bad in table.bad]}
    write_atomically(index, json.dumps(stored, ensure_ascii=False, separators=(",", ":")).encode())


def _load(
    index: Path, path: Path, fingerprint: str, shards: Sequence[Path], config: DataConfig
) -> Table | None:
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
            labels=tuple(labels),
            group=group,
            split=split,
            variants=tuple(variants),
        )
        for row, place, name, offset, size, caption, labels, group, split, variants in stored["pairs"]
    )
    return Table(
        path=path,
        sha256=fingerprint,
        pairs=tuple(pairs),
        bad=tuple(BadRow(**bad) for bad in stored["bad"]),
        names_split=bool(config.split_column),
    )
