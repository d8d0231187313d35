"""Where an image's bytes lie: in a file of its own, or as a member of a tar shard.

Enters: what a table or an index of shards names. Leaves: bytes. Called wherever an image is opened, in
threads and in decoding processes; holds neither torch nor Pillow, so that a process starts quickly.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

# Shards that a process keeps open; a system allows 256 files and more.
_MAX_OPEN: Final = 64


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A file inside an uncompressed tar file, read in place."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read_bytes(self) -> bytes:
        """The whole member. Raises OSError, also when the shard ends before the member does."""
        content = _open_shards.read(self.shard, self.offset, self.size)
        if len(content) < self.size:
            raise OSError(f"{self.shard.name} ends before {self.name} does")
        return content


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """An image's bytes in a parquet file: `row`, from 0, of `column`."""

    file: Path
    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}/{self.row}"

    @property
    def name(self) -> str:
        """For a person; the file's rows are counted from 1."""
        return f"{self.file.name}, row {self.row + 1}"

    def read_bytes(self) -> bytes:
        """The image's bytes. Raises OSError, also when the cell is empty."""
        from cliptune_trainer.data.row_groups import row_groups  # needs a package that few data sets do

        return row_groups.cell(self.file, self.column, self.row)


ImageSource: TypeAlias = Path | ShardMember | ParquetCell


class Request(NamedTuple):
    """An image to decode, and what its augmentation is drawn from."""

    image: ImageSource
    epoch: int
    row: int


class _OpenShards:
    """Descriptors of the shards read last. `os.pread` has no position, so threads share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _Descriptor] = OrderedDict()

    def read(self, shard: Path, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _Descriptor(shard)
                if len(self._files) > _MAX_OPEN:
                    # Closed when the last thread that reads through it lets it go.
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
        return os.pread(file.number, size, offset)


class _Descriptor:
    """An open file that is closed when nothing refers to it."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


_open_shards = _OpenShards()
