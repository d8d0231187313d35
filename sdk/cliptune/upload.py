"""A folder or a table on its way to a daemon: which files, and where the transfer stands.

`plan_upload` reads the files once for their checksums. A `Transfer` is pure bookkeeping over that plan: both
clients carry its calls, over as many connections as it takes, and do the waiting.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cliptune.dataset_codec as dataset_codec
from cliptune.channel import Patience
from cliptune.codec import Call
from cliptune.dataset import Dataset
from cliptune.dataset_layout import TABLES, Digest, check_files, check_name, check_path, choose_entry
from cliptune.errors import (
    CliptuneError,
    DataError,
    InvalidInputError,
    MissingColumnError,
    UnavailableError,
)
from cliptune.v1 import data_pb2

METHOD: Final = "DataService/UploadFiles"
DEFAULT_RECONNECT_S: Final = 120.0
CHUNK_BYTES: Final = 1024 * 1024
Told = Callable[[str, int, int], None]
"""What is done ("reading", "uploading"), bytes so far, bytes in all."""

# Before the daemon was heard of once, it is more likely not there than restarting.
_FIRST_CONTACT_S: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    """A file to be sent."""

    source: Path
    path: str
    """Its place in the data set, "/" between folders."""
    bytes: int
    sha256: Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadPlan:
    """A data set as it lies here."""

    name: str
    entry: str
    files: tuple[LocalFile, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    def request(self) -> data_pb2.BeginUploadRequest:
        """What begins the upload, or goes on with it."""
        files = [data_pb2.DataFile(path=f.path, bytes=f.bytes, sha256=f.sha256) for f in self.files]
        return data_pb2.BeginUploadRequest(name=self.name, files=files, entry=self.entry)


def plan_upload(
    path: str | os.PathLike[str], *, name: str, entry: str, image_column: str, told: Told
) -> UploadPlan:
    """The files of a folder, or a table with the images that it names, each read once for its checksum.

    Of a folder every file counts but hidden ones; links to files are followed. Of a table (".csv", ".tsv",
    ".jsonl") the images in `image_column` that exist are taken; they lie in its folder or below it. Any other
    file is a data set of its own, as a tar shard is. `name`: empty takes the folder's or the table's.

    `InvalidInputError` when something cannot be read, `DataError` for what cannot be part of a data set.
    """
    root = Path(path)
    try:
        if root.is_dir():
            found = _in_folder(root)
        elif root.suffix.lower() in TABLES:
            found = {root.name: root, **_named_in(root, image_column)}
        else:
            found = {root.name: root}
        name = check_name(name or (root.resolve().name if root.is_dir() else root.stem))
        sizes = {place: source.stat().st_size for place, source in found.items()}
        if not found:
            raise InvalidInputError(f"there is no file in {root}", path=root)
        entry = choose_entry(list(found), entry or ("" if root.is_dir() else root.name))
        total, done = sum(sizes.values()), 0
        files = []
        for place, source in sorted(found.items()):
            checksum = _sha256(source)
            done += sizes[place]
            told("reading", done, total)
            files.append(LocalFile(source=source, path=place, bytes=sizes[place], sha256=checksum))
    except OSError as error:
        what = error.filename or root
        raise InvalidInputError(f"{what} cannot be read: {error.strerror or error}", path=what) from error
    check_files(files)
    return UploadPlan(name=name, entry=entry, files=tuple(files))


def prepare(
    path: str | os.PathLike[str],
    *,
    name: str,
    entry: str,
    image_column: str,
    reconnect_s: float,
    told: Told,
) -> Transfer:
    """The transfer of `path`, ready to begin. Errors as of `plan_upload`."""
    plan = plan_upload(path, name=name, entry=entry, image_column=image_column, told=told)
    return Transfer(plan, reconnect_s=reconnect_s, told=told)


class Transfer:
    """One upload: what to ask, what to send next, whether to go on after a failure."""

    def __init__(self, plan: UploadPlan, *, reconnect_s: float, told: Told) -> None:
        self.plan: Final = plan
        self._request: Final = plan.request()
        self._told: Final = told
        self._reconnect_s: Final = reconnect_s
        self._patience: Final = Patience(limit_s=min(reconnect_s, _FIRST_CONTACT_S))
        self._most_held = -1
        self._error: CliptuneError | None = None

    def begin(self) -> Call[data_pb2.BeginUploadResponse]:
        """Ask what is held."""
        self._patience.opened()
        return dataset_codec.begin_upload(self._request)

    def requests(self, begun: data_pb2.BeginUploadResponse) -> Iterator[data_pb2.UploadFilesRequest]:
        """Everything that is not held yet. Ends early where a file cannot be read: `check` then tells."""
        held = list(begun.held_bytes)
        if sum(held) > self._most_held:
            # It got further: the patience begins anew.
            self._most_held = sum(held)
            self._patience.limit_s = self._reconnect_s
            self._patience.heard()
        return self._messages(begun.upload_id, held)

    def finish(self, begun: data_pb2.BeginUploadResponse) -> Call[Dataset]:
        """All has been sent."""
        return dataset_codec.finish_upload(begun.upload_id)

    def check(self) -> None:
        """Raises what went wrong on this side while requests were read."""
        if self._error is not None:
            raise self._error

    def wait_s(self, error: UnavailableError) -> float:
        """How long to wait before the next try; raises `error` after too long an absence."""
        return self._patience.wait_s(error)

    def _messages(self, upload_id: str, held: Sequence[int]) -> Iterator[data_pb2.UploadFilesRequest]:
        total, sent = self.plan.bytes, sum(held)
        self._told("uploading", sent, total)
        try:
            for index, file in enumerate(self.plan.files):
                offset = held[index]
                if offset == file.bytes:
                    continue
                with file.source.open("rb") as content:
                    content.seek(offset)
                    while offset < file.bytes:
                        chunk = content.read(min(CHUNK_BYTES, file.bytes - offset))
                        if not chunk:
                            raise InvalidInputError(
                                f"{file.source} became shorter while it was uploaded", path=file.source
                            )
                        yield data_pb2.UploadFilesRequest(
                            upload_id=upload_id, file=index, offset=offset, chunk=chunk
                        )
                        offset += len(chunk)
                        sent += len(chunk)
                        self._told("uploading", sent, total)
        except OSError as error:
            self._error = InvalidInputError(
                f"{file.source} cannot be read: {error.strerror}", path=file.source
            )
        except CliptuneError as error:
            self._error = error


def _in_folder(root: Path) -> dict[str, Path]:
    """Place in the data set → file."""
    found: dict[str, Path] = {}

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for each in folders:
            if (inner := Path(folder, each)).is_symlink():
                raise InvalidInputError(
                    f"{inner} is a link to a folder: upload the folder itself", path=inner
                )
        for name in names:
            source = Path(folder, name)
            if not name.startswith(".") and stat.S_ISREG(source.stat().st_mode):
                found[source.relative_to(root).as_posix()] = source
    return found


def _named_in(table: Path, column: str) -> dict[str, Path]:
    """The images of a table that exist. `DataError` for one outside its folder, or when there are none."""
    found: dict[str, Path] = {}
    rows = 0
    for rows, reference in enumerate(_column(table, column), start=1):
        if reference.startswith("/") or ".." in reference.split("/"):
            raise DataError(
                f"row {rows} of {table}: the image {reference} is not below the table's folder: move the "
                "table above its images, or upload the folder that holds both",
                file=table,
                row=rows,
            )
        source = table.parent / reference
        if reference and source.is_file():
            found[check_path(source.relative_to(table.parent).as_posix())] = source
    if not found:
        raise DataError(f"none of the {rows:,} images in column {column!r} of {table} exists", file=table)
    return found


def _column(table: Path, column: str) -> Iterable[str]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".jsonl":
                for line in filter(str.strip, file):
                    row = json.loads(line)
                    yield str(row.get(column) or "") if isinstance(row, dict) else ""
                return
            rows = csv.DictReader(file, delimiter="," if table.suffix.lower() == ".csv" else "\t")
            if column not in (rows.fieldnames or ()):
                has = ", ".join(rows.fieldnames or ())
                raise MissingColumnError(
                    f"{table} has no column {column!r}; it has {has}", file=table, column=column, found=has
                )
            for each in rows:
                yield each[column] or ""
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(f"{table} is no such table: {error}", file=table) from error


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
