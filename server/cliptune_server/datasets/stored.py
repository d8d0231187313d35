"""Finished data sets on disk: the files are the truth, and nothing else remembers them.

    data/<name>/dataset.json     what it is; written before the folder gets its name
    data/<name>/files.sha256     a checksum and a path a line: `cd files && sha256sum -c ../files.sha256`
    data/<name>/files/           as uploaded
    data/.uploads/               see `uploads.py`

Enters: the folder of a complete upload. Leaves: a data set that appeared by one rename, or the path that
"dataset:NAME" means. Everything here blocks: callers use a thread.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from cliptune.dataset_layout import SCHEME, check_path, is_name
from cliptune.durable import sync
from cliptune.errors import ConflictError, DataError, DatasetNotFoundError
from cliptune.v1 import data_pb2
from cliptune_server.home import write_json

log = logging.getLogger(__name__)

MANIFEST: Final = "dataset.json"
CHECKSUMS: Final = "files.sha256"
FILES: Final = "files"
UPLOADS: Final = ".uploads"
_NAMED_IN_AN_ERROR: Final = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredDataset:
    """One data set, as its manifest describes it."""

    name: str
    created_ns: int
    """UTC, since 1970."""
    files: int
    bytes: int
    entry: str
    sha256: str
    upload_id: str
    """Of the upload that it came by: finishing that again answers with this data set."""

    def message(self) -> data_pb2.Dataset:
        """As the contract has it."""
        message = data_pb2.Dataset(
            name=self.name, files=self.files, bytes=self.bytes, entry=self.entry, sha256=self.sha256
        )
        message.created.FromNanoseconds(self.created_ns)
        return message


class StoredDatasets:
    """The data sets in the folder `data/` of one home."""

    def __init__(self, root: Path) -> None:
        # Real, so that it compares with the real paths of jobs.
        self.root: Final = Path(os.path.realpath(root))

    def folder(self, name: str) -> Path:
        """Where a data set lies, or would."""
        return self.root / name

    def files_folder(self, name: str) -> Path:
        """Where its files lie."""
        return self.root / name / FILES

    def all(self) -> list[StoredDataset]:
        """Every data set, by name. A damaged one is left out, with a line in the log."""
        found = []
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(".") or not (folder / MANIFEST).is_file():
                continue  # what a person put there for relative paths
            try:
                found.append(_read(folder))
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.warning("the data set in %s cannot be read and is left out: %s", folder, error)
        return found

    def get(self, name: str) -> StoredDataset | None:
        """The data set of this name."""
        folder = self.folder(name)
        if not (folder / MANIFEST).is_file():
            return None
        try:
            return _read(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"the data set in {folder} is damaged: {error}", file=folder) from error

    def find(self, name: str) -> StoredDataset:
        """As `get`. `DatasetNotFoundError` tells what there is."""
        found = self.get(name) if is_name(name) else None
        if found is None:
            names = ", ".join(each.name for each in self.all()[:_NAMED_IN_AN_ERROR])
            there = f"there is {names}" if names else "nothing is uploaded yet"
            raise DatasetNotFoundError(f"there is no data set {name!r}; {there}", dataset=name)
        return found

    def known_files(self, wanted: Collection[bytes]) -> dict[bytes, Path]:
        """Checksum → a file with that content, of those that some data set holds."""
        found: dict[bytes, Path] = {}
        for dataset in self.all():
            checksums = self.folder(dataset.name) / CHECKSUMS
            try:
                with checksums.open(encoding="utf-8") as lines:
                    for line in lines:
                        checksum, _, path = line.rstrip("\n").partition("  ")
                        if (digest := bytes.fromhex(checksum)) in wanted:
                            found[digest] = self.files_folder(dataset.name) / path
            except (OSError, ValueError) as error:
                log.warning("%s cannot be read; its files are sent again: %s", checksums, error)
        return found

    def locate(self, reference: str) -> str:
        """The path that "dataset:NAME" (what a job reads of it) or "dataset:NAME/PATH" means.

        `DatasetNotFoundError`, `DataError`.
        """
        name, _, inner = reference.removeprefix(SCHEME).partition("/")
        found = self.find(name)
        inside = check_path(inner) if inner else found.entry
        return str(self.files_folder(name) / inside)

    def check_free(self, name: str) -> None:
        """`ConflictError` when something that is no data set has this name."""
        if (folder := self.folder(name)).exists():
            raise ConflictError(f"{folder} is there and is no data set: choose another name", dataset=name)

    def publish(self, folder: Path, dataset: StoredDataset) -> None:
        """Give the folder of a complete upload its name, at once."""
        write_json(folder / MANIFEST, asdict(dataset), mode=0o644)
        self.check_free(dataset.name)
        folder.rename(self.folder(dataset.name))
        sync(self.root)

    def remove(self, name: str, check_unused: Callable[[], None]) -> None:
        """Take a data set away, at once. Stays when `check_unused` raises.

        Asked before and after: between the two a job may have been admitted that found it still there.
        """
        check_unused()
        folder = self.folder(name)
        gone = self.root / UPLOADS / f".gone-{uuid.uuid4().hex}"
        gone.parent.mkdir(exist_ok=True)
        folder.rename(gone)
        try:
            check_unused()
        except BaseException:
            gone.rename(folder)
            raise
        sync(self.root)
        shutil.rmtree(gone, ignore_errors=True)


def _read(folder: Path) -> StoredDataset:
    written: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    known = {field.name: written[field.name] for field in fields(StoredDataset)}
    if known["name"] != folder.name:
        raise ValueError(f"it holds the data set {known['name']}")
    return StoredDataset(**known)
