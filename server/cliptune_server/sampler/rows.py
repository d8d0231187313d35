"""What a data set's rows look like, whatever its form: columns, how many there are, a few of them.

Enters: the folder of an uploaded data set and what a job reads of it. Leaves: a `Look`, with images as bytes
that are read when they are asked for. Called by the process's main. What a table names is opened only inside
the data set's own folder.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from cliptune.dataset_layout import TABLES, matching
from cliptune_server.sampler.spread import spread

NOT_COUNTED: Final = -1
_MAX_COLUMNS: Final = 64
_MAX_FIELD_CHARS: Final = 500
_MAX_IMAGE_BYTES: Final = 64 * 1024 * 1024
_PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_OTHER_PICTURES: Final = (".dcm", ".dicom", ".fits", ".fit", ".fts")
# Where a table has several columns that name files, the image is in the first of these.
_USUAL: Final[tuple[str, ...]] = ("image", "image_path", "file_name", "filename", "filepath", "path", "file")

Picture = Callable[[], bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row. `number` 1 is the first."""

    number: int
    fields: Mapping[str, str]
    picture: Picture | None = None
    """Bytes of its image file. None: it has none that can be found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A data set at a glance."""

    columns: tuple[str, ...] = ()
    rows: int = NOT_COUNTED
    samples: tuple[Row, ...] = field(default=())


def look(folder: Path, entry: str, samples: int) -> Look:
    """At most `samples` rows of what `entry` means in `folder`.

    ValueError, OSError or tarfile.TarError where it cannot be read.
    """
    root = Path(os.path.realpath(folder))
    paths = matching(sorted(_files(root)), entry)
    if len(paths) == 1 and paths[0].lower().endswith(TABLES):
        return _table(root, paths[0], samples)
    parquet = [path for path in paths if path.endswith(".parquet")]
    if parquet:
        return _parquet(root, parquet, samples)
    shards = [path for path in paths if path.endswith(".tar")]
    if shards:
        return _shards(root, shards, samples)
    return _image_folder(root, entry, paths, samples)


def _table(root: Path, path: str, samples: int) -> Look:
    folder = (root / path).parent
    columns: list[str] = []
    rows = _jsonl(root / path, columns) if path.lower().endswith(".jsonl") else _csv(root / path, columns)
    chosen, count = spread(rows, samples)
    usual = [name for name in _USUAL if name in columns]
    order = usual + [name for name in columns if name not in usual]
    shown = columns[:_MAX_COLUMNS]
    found = []
    for number, cells in chosen:
        row = dict(zip(columns, cells, strict=False))  # a row may have cells too few or too many
        found.append(
            Row(
                number=number,
                fields={name: _short(row.get(name, "")) for name in shown},
                picture=_find_picture(root, folder, [row.get(name, "") for name in order]),
            )
        )
    return Look(columns=tuple(shown), rows=count, samples=tuple(found))


def _csv(path: Path, columns: list[str]) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t")
        columns += next(rows, ())
        yield from filter(None, rows)


def _jsonl(path: Path, columns: list[str]) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is no object")
            columns += [name for name in row if name not in columns]
            yield [_text(row.get(name)) for name in columns]


def _find_picture(root: Path, folder: Path, values: Sequence[str]) -> Picture | None:
    """The first value that names a file of the data set, from the table's folder or from the whole's."""
    for value in filter(None, values):
        # A caption is tried as a path too: it may be too long for one, or hold what no path can.
        with contextlib.suppress(OSError, ValueError):
            for start in (folder, root):
                real = Path(os.path.realpath(start / value))
                if real.is_relative_to(root) and real.is_file():
                    return partial(_read, real)
    return None


def _image_folder(root: Path, entry: str, paths: Sequence[str], samples: int) -> Look:
    images = [path for path in paths if path.lower().endswith(_PICTURES + _OTHER_PICTURES)]
    if not images:
        return Look()
    chosen, count = spread(images, samples)
    base = entry if entry and (root / entry).is_dir() else "."
    return Look(
        columns=("image", "label"),
        rows=count,
        samples=tuple(
            Row(
                number=number,
                fields={"image": os.path.relpath(path, base), "label": Path(path).parent.name},
                picture=partial(_read, root / path),
            )
            for number, path in chosen
        ),
    )


def _shards(root: Path, shards: Sequence[str], samples: int) -> Look:
    """The first samples of the first shard: to spread them would mean to read it all."""
    rows: list[Row] = []
    columns: dict[str, None] = {}
    with tarfile.open(root / shards[0], "r:") as tar:
        members = (member for member in tar if member.isfile())
        for key, group in itertools.groupby(members, key=_key):
            if len(rows) == samples:
                break
            fields: dict[str, str] = {}
            picture: Picture | None = None
            for member in group:
                kind = member.name.removeprefix(key).lower()
                if kind.endswith(_PICTURES):
                    fields["image"] = member.name
                    picture = partial(bytes, _member(tar, member))
                elif kind == ".json":
                    with contextlib.suppress(ValueError):
                        content = json.loads(_member(tar, member))
                        if isinstance(content, dict):
                            fields |= {name: _short(_text(value)) for name, value in content.items()}
                else:
                    name = "caption" if kind == ".txt" else kind.removeprefix(".")
                    fields[name] = _short(_member(tar, member).decode("utf-8", "replace"))
            columns |= dict.fromkeys(fields)
            rows.append(Row(number=len(rows) + 1, fields=fields, picture=picture))
    return Look(columns=tuple(columns)[:_MAX_COLUMNS], samples=tuple(rows))


def _parquet(root: Path, files: Sequence[str], samples: int) -> Look:
    """The first rows of the first file. Without pyarrow (`cliptune[parquet]`) nothing is known."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        return Look()
    count = sum(parquet.read_metadata(root / file).num_rows for file in files)
    with parquet.ParquetFile(root / files[0]) as first:
        columns = tuple(first.schema_arrow.names)
        batch = next(first.iter_batches(max(1, samples)), None)
        taken = batch.to_pylist()[:samples] if batch is not None else []
    rows = []
    for number, row in enumerate(taken, start=1):
        embedded = next((v for v in row.values() if isinstance(v, dict) and v.get("bytes")), None)
        fields = {name: _short(_text(value)) for name, value in row.items() if value is not embedded}
        if embedded is not None:
            fields["image"] = _short(str(embedded.get("path") or ""))
        picture = partial(bytes, embedded["bytes"]) if embedded is not None else None
        rows.append(Row(number=number, fields=fields, picture=picture))
    return Look(columns=columns[:_MAX_COLUMNS], rows=count, samples=tuple(rows))


def _files(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name).relative_to(root).as_posix() for name in names)


def _key(member: tarfile.TarInfo) -> str:
    """What the members of one sample share: the path up to the first dot of its last part."""
    folder, _, name = member.name.rpartition("/")
    stem = name.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    return content.read(_MAX_IMAGE_BYTES) if content is not None else b""


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_IMAGE_BYTES)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short(text: str) -> str:
    clean = text.encode("utf-8", "replace").decode()
    return clean if len(clean) <= _MAX_FIELD_CHARS else f"{clean[:_MAX_FIELD_CHARS]}…"
