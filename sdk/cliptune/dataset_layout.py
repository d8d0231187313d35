"""What a data set to be uploaded may be made of: its name, its files' paths, which of them a job reads.

Pure; client and daemon ask the same functions, so that what is wrong is told before a byte is sent and is
refused whoever sends it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Final, Protocol, TypeAlias

from cliptune.errors import DataError, InvalidInputError

SCHEME: Final = "dataset:"
"""Before the name of an uploaded data set in a job's spec."""
MAX_FILES: Final = 500_000
TABLES: Final = (".csv", ".tsv", ".tab", ".jsonl")

Digest: TypeAlias = bytes

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\\]")
_MAGIC: Final = re.compile(r"[*?\[{]")
_MAX_PATH_BYTES: Final = 1024
_MAX_PART_BYTES: Final = 255
_NAMED_IN_AN_ERROR: Final = 5


class File(Protocol):
    """A file of a data set, as `cliptune.v1.DataFile` has it."""

    @property
    def path(self) -> str:
        """Relative, "/" between folders."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> Digest:
        """Of its content, 32 bytes."""


def is_name(name: str) -> bool:
    """Whether a data set may be called so."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """The name itself, or `InvalidInputError`."""
    if not is_name(name):
        raise InvalidInputError(
            f"{name!r} is no name of a data set: letters, digits, '-', '_' and '.', at most 64, "
            "a letter or digit first",
            name=name,
        )
    return name


def check_path(path: str) -> str:
    """The path itself, or `DataError`: relative, "/" between folders, nothing that leads elsewhere."""
    parts = path.split("/")
    if (
        any(part in ("", ".", "..") or len(part.encode()) > _MAX_PART_BYTES for part in parts)
        or _CONTROL.search(path)
        or len(path.encode()) > _MAX_PATH_BYTES
    ):
        raise DataError(
            f"{path[:200]!r} is no path of a file in a data set: relative, '/' between folders, no '..', "
            f"at most {_MAX_PATH_BYTES} bytes",
            file=path[:200],
        )
    return path


def check_files(files: Sequence[File]) -> None:
    """Every path, size and checksum. `InvalidInputError` or `DataError` for the first that cannot be."""
    if not files:
        raise InvalidInputError("a data set without files", path="files")
    if len(files) > MAX_FILES:
        raise InvalidInputError(
            f"{len(files):,} files; a data set has at most {MAX_FILES:,}: put small files into tar shards",
            limit=MAX_FILES,
        )
    seen: set[str] = set()
    for file in files:
        check_path(file.path)
        if file.path in seen:
            raise DataError(f"{file.path} is listed twice", file=file.path)
        seen.add(file.path)
        if file.bytes < 0 or len(file.sha256) != hashlib.sha256().digest_size:
            raise DataError(f"{file.path} comes without its size or its SHA-256 of 32 bytes", file=file.path)


def choose_entry(paths: Sequence[str], entry: str) -> str:
    """What a job reads of these files: `entry` when it is there; else the only table; else "", all of them.

    `DataError` when nothing is at `entry`, or when it is not said which of several tables is meant.
    """
    if entry:
        check_path(entry)
        if matching(paths, entry):
            return entry
        raise DataError(f"the data set has no {entry}; it has {_some(paths)}", entry=entry)
    tables = [path for path in paths if path.lower().endswith(TABLES)]
    outer = [path for path in tables if "/" not in path]
    for candidates in (tables, outer):
        if len(candidates) == 1:
            return candidates[0]
    if tables:
        raise DataError(f"the data set has several tables: {_some(tables)}; name one of them as its entry")
    return ""


def matching(paths: Iterable[str], entry: str) -> list[str]:
    """The files that an entry means: itself, those of a folder, those of a pattern. Empty: all."""
    if not entry:
        return list(paths)
    pattern = _regex(entry)
    return [
        path
        for path in paths
        if path == entry or path.startswith(f"{entry}/") or pattern.fullmatch(path) is not None
    ]


def is_pattern(path: str) -> bool:
    """Whether a path may mean several files, as "shards/{000..127}.tar" and "shards/*.tar" do."""
    return _MAGIC.search(path) is not None


def content_sha256(files: Iterable[File]) -> str:
    """One checksum, in hex, over paths, sizes and checksums of all files, in whatever order they come."""
    content = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        content.update(f"{file.sha256.hex()} {file.bytes} {file.path}\n".encode())
    return content.hexdigest()


def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern of shards as a regular expression; braces with a range stand for any number."""
    out = ""
    for piece in re.split(r"(\{[^{}]*\}|\*|\?)", pattern):
        if piece == "*":
            out += "[^/]*"
        elif piece == "?":
            out += "[^/]"
        elif piece.startswith("{") and ".." in piece:
            out += r"\d+"
        elif piece.startswith("{"):
            out += "(" + "|".join(re.escape(option) for option in piece[1:-1].split(",")) + ")"
        else:
            out += re.escape(piece)
    return re.compile(out)


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(sorted(paths)[:_NAMED_IN_AN_ERROR])
    return (
        shown if len(paths) <= _NAMED_IN_AN_ERROR else f"{shown} and {len(paths) - _NAMED_IN_AN_ERROR:,} more"
    )
