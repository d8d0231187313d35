"""What opening a data set's images finds: which cannot be read, which are the same, how deep they are.

Enters: tables and how images are read. Leaves: `Findings`, stored in the job's folder by `prepare` and
trusted by `run` as long as the tables are the same. Called by `dataset`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cliptune.errors import CliptuneError, ConflictError
from cliptune_trainer.data.source import ImageSource, ShardMember
from cliptune_trainer.data.table import Table
from cliptune_trainer.image.reading import Reading

# Decoding every image of a huge data set would take hours: beyond this many only an even sample is decoded,
# the others are checked for being there, and content is compared by the files' bytes.
MAX_DECODED: Final = 20_000
_ENDS_BYTES: Final = 4096
_BYTES: Final = "bytes "


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What examining the tables found. Tables are named by their paths, rows by their numbers.

    Attributes:
        tables: their fingerprints.
        unreadable: row → why its image cannot be read.
        contents: row → a name of its image's content, for images whose content is there under several names.
        depths: depth of images → how many there are, and the first row of one.
    """

    tables: dict[str, str]
    unreadable: dict[str, dict[int, str]]
    contents: dict[str, dict[int, str]] = field(default_factory=dict)
    depths: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def store(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "tables": self.tables,
            "unreadable": self.unreadable,
            "contents": self.contents,
            "depths": self.depths,
        }

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Findings:
        """Inverse of `store`."""
        return cls(
            tables=dict(stored["tables"]),
            unreadable=_by_row(stored["unreadable"]),
            contents=_by_row(stored.get("contents", {})),
            depths={
                path: {depth: (count, row) for depth, (count, row) in depths.items()}
                for path, depths in stored.get("depths", {}).items()
            },
        )


def load_findings(path: Path) -> Findings | None:
    """What `prepare` stored, or None."""
    return Findings.load(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def fingerprints(tables: Iterable[Table]) -> dict[str, str]:
    """Path → sha256."""
    return {str(table.path): table.sha256 for table in tables}


def examine(tables: Sequence[Table], reading: Reading) -> Findings:
    """Opens the images, each once.

    Raises:
        ConflictError: the package that reads such images is not installed.
    """
    images = list(dict.fromkeys(pair.image for table in tables for pair in table.pairs))
    every = max(len(images) // MAX_DECODED, 1)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="examine") as pool:
        jobs = [
            pool.submit(_look, image, reading, decode=place % every == 0, by_pixels=every == 1)
            for place, image in enumerate(images)
        ]
        try:
            looks = {image: job.result() for image, job in zip(images, jobs, strict=True)}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    names = _content_names(looks)
    unreadable: dict[str, dict[int, str]] = {}
    contents: dict[str, dict[int, str]] = {}
    depths: dict[str, dict[str, tuple[int, int]]] = {}
    for table in tables:
        path = str(table.path)
        rows = {pair.row: pair.image for pair in table.pairs}
        unreadable[path] = {row: looks[image].reason for row, image in rows.items() if looks[image].reason}
        contents[path] = {row: names[image] for row, image in rows.items() if image in names}
        depths[path] = _depths((row, looks[image].depth) for row, image in rows.items())
    return Findings(tables=fingerprints(tables), unreadable=unreadable, contents=contents, depths=depths)


@dataclass(frozen=True, slots=True)
class _Look:
    """At one image. `content`: equal for equal images; "": unknown."""

    reason: str = ""
    content: str = ""
    depth: str = ""


def _look(image: ImageSource, reading: Reading, *, decode: bool, by_pixels: bool) -> _Look:
    try:
        if not decode:
            return _Look(content=_ends(image))
        encoded = image.read_bytes()
        opened = reading(encoded)
        if not by_pixels:
            return _Look(content=_ends(image), depth=opened.depth)
        pixels = hashlib.blake2b(repr(opened.image.size).encode(), digest_size=16)
        pixels.update(opened.image.tobytes())
        return _Look(content=pixels.hexdigest(), depth=opened.depth)
    except OSError as error:
        return _Look(reason=f"{image.name}: {error.strerror or error}")
    except ConflictError:
        raise
    except CliptuneError as error:
        return _Look(reason=f"{image.name}: {error.message}")


def _ends(image: ImageSource) -> str:
    """Of a file's size, first and last bytes: files that differ here are different. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, Path):
        with image.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(size - _ENDS_BYTES, 0))
            digest.update(file.read(_ENDS_BYTES))
    elif isinstance(image, ShardMember):
        size = image.size
        head, tail = min(size, _ENDS_BYTES), max(size - _ENDS_BYTES, 0)
        digest.update(ShardMember(image.shard, image.name, image.offset, head).read_bytes())
        digest.update(ShardMember(image.shard, image.name, image.offset + tail, size - tail).read_bytes())
    else:
        content = image.read_bytes()
        size = len(content)
        digest.update(content)
    return f"{_BYTES}{size} {digest.hexdigest()}"


def _content_names(looks: Mapping[ImageSource, _Look]) -> dict[ImageSource, str]:
    """Image → name of its content, for content that several images have."""
    counts = Counter(look.content for look in looks.values() if look.content)
    found: dict[ImageSource, str] = {}
    for image, look in looks.items():
        if counts[look.content] > 1:
            name = look.content
            if name.startswith(_BYTES):  # only their ends were compared
                try:
                    name = hashlib.blake2b(image.read_bytes(), digest_size=16).hexdigest()
                except OSError:
                    continue
            found[image] = name
    confirmed = Counter(found.values())
    return {image: name for image, name in found.items() if confirmed[name] > 1}


def _depths(rows: Iterable[tuple[int, str]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for row, depth in rows:
        if depth:
            count, first = found.get(depth, (0, row))
            found[depth] = (count + 1, first)
    return found


def _by_row(stored: Mapping[str, Mapping[str, str]]) -> dict[str, dict[int, str]]:
    return {path: {int(row): value for row, value in rows.items()} for path, rows in stored.items()}
