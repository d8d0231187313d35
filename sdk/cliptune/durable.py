"""Files that are whole or absent, and how a full disk is told from other failures.

Enters: bytes and a path. Leaves: a file on disk. Called wherever daemon, trainer and exporter keep state.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Final

# A quota and a file-size limit are a full disk for whoever writes.
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Writes a file so that a reader, or a crash at any point, sees the old content or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's bytes, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that no more can be written.

    safetensors reports the system's error only in its text: "(os error 28)".
    """
    while error is not None:
        if isinstance(error, OSError):
            if error.errno in _FULL:
                return True
        elif (told := _OS_ERROR.search(str(error))) and int(told[1]) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
