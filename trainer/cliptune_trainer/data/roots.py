"""The folders that a job may read from.

Enters: a path out of a spec or a table. Leaves: the real path, symbolic links followed. Called by whatever
opens a file that a user named. A path that leads elsewhere is a `PathOutsideRootsError`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from cliptune.errors import PathOutsideRootsError


class DataRoots:
    """Folders that may be read; none given means every folder (a trainer started by hand)."""

    def __init__(self, roots: Sequence[Path] = ()) -> None:
        self.roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)

    def table(self, path: str) -> Path:
        """Where a table file really is. A relative path is looked for in each root in turn."""
        given = Path(path)
        if given.is_absolute() or not self.roots:
            return self.checked(given)
        found = next((root / given for root in self.roots if (root / given).exists()), self.roots[0] / given)
        return self.checked(found)

    def checked(self, path: Path) -> Path:
        """The real path. Raises `PathOutsideRootsError` when it lies in none of the roots; need not exist."""
        # The folder's links are followed once for all its images.
        real = Path(self._real_folder(path.parent)) / path.name
        if path.name == ".." or real.is_symlink():
            real = Path(os.path.realpath(real))
        if self.roots and not any(real.is_relative_to(root) for root in self.roots):
            raise PathOutsideRootsError(
                f"{path} lies outside the folders that may be read: {', '.join(map(str, self.roots))}",
                path=path,
                roots=os.pathsep.join(map(str, self.roots)),
            )
        return real
