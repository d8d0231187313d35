"""Memory that the trainer and its decoding processes both write to and read from.

Enters: a size. Leaves: the same bytes in every process that is handed the object while it is spawned. Called
by `pools`. Nothing is left behind in the file system, however the processes end.
"""

from __future__ import annotations

import mmap
import os
import sys
from multiprocessing import reduction
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Protocol


class SharedBytes(Protocol):
    """Bytes that a spawned process sees too. Hand it over among the process's arguments."""

    @property
    def buffer(self) -> memoryview:
        """All of it, writable. Zeros at first."""
        ...

    def close(self) -> None:
        """Lets it go, in this process; nothing may still look into `buffer`."""
        ...


def shared_bytes(size: int) -> SharedBytes:
    """`size` bytes, taken as they are written to. Raises OSError when there is no room."""
    return AnonymousBytes.create(size) if sys.platform == "linux" else NamedBytes(size)


class AnonymousBytes:
    """Linux: a file without a name in memory. /dev/shm is not used: containers often give it 64 MB."""

    def __init__(self, descriptor: int) -> None:
        """Takes the open file over."""
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, size: int) -> AnonymousBytes:
        """A new one."""
        if sys.platform != "linux":
            raise OSError("files without a name are Linux's")
        descriptor = os.memfd_create("cliptune-loader")
        os.ftruncate(descriptor, size)
        return cls(descriptor)

    @property
    def buffer(self) -> memoryview:
        """See `SharedBytes`."""
        return memoryview(self._map)

    def close(self) -> None:
        """See `SharedBytes`."""
        self._map.close()
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (reduction.DupFd(self._descriptor),)


def _receive(handed: Any) -> AnonymousBytes:
    return AnonymousBytes(handed.detach())


class NamedBytes:
    """Elsewhere: POSIX shared memory. Python's resource tracker removes it should the trainer be killed."""

    def __init__(self, size: int = 0, name: str | None = None) -> None:
        self._owner = name is None
        self._memory = SharedMemory(name=name, create=self._owner, size=size)

    @property
    def buffer(self) -> memoryview:
        """See `SharedBytes`."""
        buffer = self._memory.buf
        if buffer is None:
            raise ValueError("the shared memory is closed")
        return buffer

    def close(self) -> None:
        """See `SharedBytes`."""
        self._memory.close()
        if self._owner:
            self._memory.unlink()

    def __reduce__(self) -> tuple[Any, ...]:
        return NamedBytes, (0, self._memory.name)
