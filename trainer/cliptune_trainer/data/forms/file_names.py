"""Which shards or parquet files a spec means by one name.

Enters: "a.tar", "a-{000..127}.tar", "a-*.tar" or a folder. Leaves: the files, each in a folder that may
be read. Called by `shards` and `parquet`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cliptune.errors import DataError
from cliptune_trainer.data.roots import DataRoots

_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_RANGE: Final = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES: Final = 100_000


def find_files(path: str, suffix: str, roots: DataRoots) -> list[Path]:
    """The files that a name, a pattern or a folder means: braces in their order, the rest sorted.

    Args:
        path: "a.tar", "a-{000..127}.tar", "a-*.tar" or a folder.
        suffix: of the files that a folder means, such as ".tar".
        roots: folders that may be read.

    Raises:
        DataError: there are none, or too many.
        PathOutsideRootsError: one lies outside the roots.
    """
    found: list[Path] = []
    for name in _expanded(path):
        if glob.has_magic(name):
            found += _matching(name, roots)
        else:
            real = roots.table(name)
            found += sorted(real.rglob(f"*{suffix}")) if real.is_dir() else [real]
        if len(found) > _MAX_FILES:
            raise DataError(f"{path} means more than {_MAX_FILES:,} files", file=path)
    if not found:
        raise DataError(f"{path}: no {suffix} file is there", file=path)
    return [roots.checked(file) for file in found]


def _matching(pattern: str, roots: DataRoots) -> list[Path]:
    """Files that match, in the first root that has some. What lies outside the roots is not looked at."""
    parts = Path(pattern).parts
    if ".." in parts:
        raise DataError(f"a pattern cannot hold '..': {pattern}", file=pattern)
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    starts = [Path(*parts[:fixed])]
    if not starts[0].is_absolute() and roots.roots:
        starts = [root / starts[0] for root in roots.roots]
    for start in starts:
        roots.checked(start)
        if matched := sorted(start.glob("/".join(parts[fixed:]))):
            return matched
    return []


def _expanded(pattern: str) -> Iterator[str]:
    """`{000..127}` and `{a,b}` written out."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    span = _RANGE.fullmatch(match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MAX_FILES:
            raise DataError(f"{match[0]} in {pattern} is no range of files", file=pattern)
        options: Sequence[str] = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    else:
        options = match[1].split(",")
    for option in options:
        yield from _expanded(pattern[: match.start()] + option + pattern[match.end() :])
