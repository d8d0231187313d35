"""Uploads under way: each a folder whose files grow until they are whole.

    data/.uploads/<id>/request.bin    the BeginUploadRequest that began it
    data/.uploads/<id>/files/         what is here so far: a file's size says how much of it

Enters: chunks, in order within each file. Leaves: a folder in which every checksum is right, ready for its
name. The id follows from name and content, so that a client who comes back, or another one with the same
files, goes on with the same upload. Everything here blocks, and may be called from any thread.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from cliptune.dataset_layout import content_sha256
from cliptune.durable import sync, write_atomically
from cliptune.errors import ConflictError, DataError, InvalidInputError, NotFoundError
from cliptune.v1 import data_pb2
from cliptune_server.datasets.stored import CHECKSUMS, FILES, StoredDataset

log = logging.getLogger(__name__)

_REQUEST: Final = "request.bin"
_NO_FILE: Final = -1


class Upload:
    """One upload. Made by `create` or `reopen_all`."""

    def __init__(self, folder: Path, request: data_pb2.BeginUploadRequest) -> None:
        self.id: Final = folder.name
        self.name: Final = request.name
        self.entry: Final = request.entry
        """Already chosen, where the client did not."""
        self.bytes: Final = sum(file.bytes for file in request.files)
        """Of all files, when they are whole."""
        self.sha256: Final = content_sha256(request.files)
        self.streams = 0
        """Connections that send to it now; kept by the caller."""
        self._folder: Final = folder
        self._files: Final = request.files
        self._held: Final = [_size(self._path(index), file.bytes) for index, file in enumerate(self._files)]
        self._right: Final[set[int]] = set()
        """Whole files whose checksum was found right while they came in."""
        self._lock: Final = threading.Lock()
        self._ticket = 0
        self._over = False
        self._open = _NO_FILE
        self._descriptor = -1
        self._hash: Any = None
        """Of the open file's bytes; None where its beginning came earlier."""

    @classmethod
    def create(
        cls,
        root: Path,
        upload_id: str,
        request: data_pb2.BeginUploadRequest,
        known: Mapping[bytes, Path],
    ) -> Upload:
        """A new one below `root`; a crash leaves the whole of it or a leftover that `reopen_all` removes.

        `known`: checksum → a file with that content, which is linked rather than sent again. `DataError` when
        two paths are one on this file system.
        """
        root.mkdir(exist_ok=True)
        hidden = root / f".new-{uuid.uuid4().hex}"
        try:
            (hidden / FILES).mkdir(parents=True, mode=0o700)
            write_atomically(hidden / _REQUEST, request.SerializeToString())
            for file in request.files:
                path = hidden / FILES / file.path
                _make(path, file.path)
                if file.sha256 in known:
                    _link(known[file.sha256], path, file.bytes)
            hidden.rename(root / upload_id)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        sync(root)
        return cls(root / upload_id, request)

    @property
    def idle_s(self) -> float:
        """Since somebody last began it or went on with it."""
        return time.time() - (self._folder / _REQUEST).stat().st_mtime

    def held(self) -> list[int]:
        """For each file, how many of its first bytes are here."""
        return list(self._held)

    def whole_files(self) -> dict[bytes, Path]:
        """Checksum → file, of those that are here to their last byte."""
        return {
            file.sha256: self._path(index)
            for index, (file, held) in enumerate(zip(self._files, self._held, strict=True))
            if held == file.bytes
        }

    def touch(self) -> None:
        """Somebody goes on with it."""
        os.utime(self._folder / _REQUEST)

    def new_ticket(self) -> int:
        """The right to write. Takes it from who had it before: a connection that broke may seem to stand."""
        with self._lock:
            self._ticket += 1
            return self._ticket

    def write(self, ticket: int, index: int, offset: int, chunk: bytes) -> None:
        """Append to a file.

        `ConflictError` for another offset than is held, or a ticket that was taken away. `DataError` when the
        file is whole and its checksum is not the one announced: it then begins anew. OSError when the disk is
        full; what was written of the chunk counts.
        """
        with self._lock:
            self._check_open()
            if ticket != self._ticket:
                raise ConflictError("another connection goes on with this upload", upload_id=self.id)
            if not 0 <= index < len(self._files):
                raise InvalidInputError(f"there is no file {index}; there are {len(self._files)}", file=index)
            file, held = self._files[index], self._held[index]
            if offset != held:
                raise ConflictError(
                    f"{file.path} holds {held} bytes; what was sent begins at {offset}", held_bytes=held
                )
            if offset + len(chunk) > file.bytes:
                raise InvalidInputError(f"{file.path} was announced with {file.bytes} bytes", file=file.path)
            self._turn_to(index)
            try:
                self._append(index, chunk)
            except OSError:
                self._close()
                raise
            if self._held[index] == file.bytes:
                self._check(index, self._hash.digest() if self._hash is not None else None)
                self._close()

    def complete(self) -> None:
        """Returns when every file is whole and right; reads again those that came over several connections.

        `ConflictError` names a file that lacks bytes; `DataError` one that is not what was announced.
        """
        with self._lock:
            self._check_open()
            self._ticket += 1
            self._close()
            for index, file in enumerate(self._files):
                if self._held[index] < file.bytes:
                    raise ConflictError(
                        f"{file.path} holds {self._held[index]} of {file.bytes} bytes", file=file.path
                    )
            for index in range(len(self._files)):
                if index not in self._right:
                    with self._path(index).open("rb") as content:
                        self._check(index, hashlib.file_digest(content, "sha256").digest())

    def seal(self) -> tuple[Path, StoredDataset]:
        """The folder, ready to be given its name, and what it is. After `complete`."""
        with self._lock:
            self._check_open()
            lines = (f"{file.sha256.hex()}  {file.path}\n" for file in self._files)
            write_atomically(self._folder / CHECKSUMS, "".join(lines).encode())
            # One flush of everything: one by one, ten thousand small files would take half a minute.
            os.sync()
            return self._folder, StoredDataset(
                name=self.name,
                created_ns=time.time_ns(),
                files=len(self._files),
                bytes=self.bytes,
                entry=self.entry,
                sha256=self.sha256,
                upload_id=self.id,
            )

    def published(self, folder: Path) -> None:
        """It has its name: what was needed to go on with it goes."""
        with self._lock:
            self._over = True
        (folder / _REQUEST).unlink(missing_ok=True)

    def discard(self) -> None:
        """Throw it away."""
        with self._lock:
            self._over = True
            self._close()
            gone = self._folder.with_name(f".gone-{uuid.uuid4().hex}")
            self._folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def close(self) -> None:
        """It stays as it is for the next daemon."""
        with self._lock:
            self._over = True
            self._close()

    def _path(self, index: int) -> Path:
        return self._folder / FILES / self._files[index].path

    def _turn_to(self, index: int) -> None:
        if self._open == index:
            return
        self._close()
        self._descriptor = os.open(self._path(index), os.O_WRONLY | os.O_NOFOLLOW)
        self._open = index
        self._hash = hashlib.sha256() if self._held[index] == 0 else None

    def _append(self, index: int, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self._descriptor, view, self._held[index])
            self._held[index] += written
            if self._hash is not None:
                self._hash.update(view[:written])
            view = view[written:]

    def _check(self, index: int, digest: bytes | None) -> None:
        """Remember that a whole file is right, or empty it. Without a digest: `complete` will look."""
        if digest is None:
            return
        file = self._files[index]
        if digest == file.sha256:
            self._right.add(index)
            return
        _empty(self._path(index))
        self._held[index] = 0
        self._close()
        raise DataError(
            f"{file.path} has another checksum than was announced: it changed meanwhile, or was damaged on "
            "its way; upload it again",
            file=file.path,
        )

    def _close(self) -> None:
        if self._open != _NO_FILE:
            os.close(self._descriptor)
            self._open, self._hash = _NO_FILE, None

    def _check_open(self) -> None:
        if self._over:
            raise NotFoundError(f"the upload {self.id} is over", upload_id=self.id)


def upload_id(name: str, entry: str, sha256: str) -> str:
    """The id of an upload of this content under this name."""
    return hashlib.sha256(f"{name}\n{entry}\n{sha256}".encode()).hexdigest()[:32]


def reopen_all(root: Path) -> Iterator[Upload]:
    """The uploads that an earlier daemon left, without the leftovers of crashes."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        request = data_pb2.BeginUploadRequest()
        try:
            if folder.name.startswith("."):
                raise FileNotFoundError(folder)
            request.ParseFromString((folder / _REQUEST).read_bytes())
            upload = Upload(folder, request)
        except (OSError, DecodeError) as error:
            log.info("the leftover %s is removed: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            yield upload


def _make(path: Path, shown: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{shown} and another file have one place on the daemon's disk", file=shown) from None


def _size(path: Path, announced: int) -> int:
    """How much is here. More than announced, or no file at all, is damage: it begins anew."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = announced + 1
    if size > announced:
        _empty(path)
        return 0
    return size


def _empty(path: Path) -> None:
    """Begin a file anew. Another data set may hold what was there, so it is let go, not changed."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _link(source: Path, path: Path, announced: int) -> None:
    """Put a file of equal content in the place of an empty one; where that cannot be, it will be sent."""
    try:
        if source.stat().st_size == announced:
            path.unlink()
            os.link(source, path, follow_symlinks=False)
    except OSError as error:  # too many links, or a file system that has none
        log.info("%s is not linked: %s", source, error)
        path.touch()


def total_held(uploads: Sequence[Upload]) -> int:
    """Bytes that uploads under way take."""
    return sum(sum(upload.held()) for upload in uploads)
