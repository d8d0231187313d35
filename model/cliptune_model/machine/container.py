"""What a container leaves to a process: the limits of Linux control groups, versions 1 and 2.

Enters: the mounted control groups. Leaves: `Limits`. Called by `hardware`. Elsewhere than on Linux there
are no such files, and no limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
# Version 1 writes "no limit" as a huge number of bytes.
_NO_LIMIT_BYTES: Final = 2**60


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of the groups that a process is in. None: no limit.

    Attributes:
        memory_bytes: the lowest limit.
        cores: whole cores of the lowest quota, at least 1.
        groups: folders with a limit on memory.
    """

    memory_bytes: int | None = None
    cores: int | None = None
    groups: tuple[Path, ...] = ()

    def free_bytes(self, *, default: int) -> int:
        """What is left below the limits now; at most `default`. Pages that can be dropped count."""
        left = [default]
        for folder in self.groups:
            limit = _memory_limit(folder)
            if limit is not None:
                left.append(limit - _held_bytes(folder))
        return max(0, min(left))


def container_limits(root: Path = _ROOT, membership: str | None = None) -> Limits:
    """The limits of this process.

    Args:
        root: where the control groups are mounted.
        membership: the text of /proc/self/cgroup; None: this process's. In a container its path may be one of
            the host's, which is not there: then the root's own limits count. Those of every parent count too.
    """
    if membership is None:
        membership = text_of(Path("/proc/self/cgroup"))
    memory: list[int] = []
    cores: list[int] = []
    groups: list[Path] = []
    for line in membership.splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for base in [root / name for name in controllers.split(",") if name in ("memory", "cpu")] or [root]:
            folder = base / path.strip("/")
            for place in (folder, *folder.parents):
                if not place.is_relative_to(base):
                    break
                if (limit := _memory_limit(place)) is not None and place not in groups:
                    memory.append(limit)
                    groups.append(place)
                if (quota := _quota_cores(place)) is not None:
                    cores.append(quota)
    return Limits(
        memory_bytes=min(memory, default=None), cores=min(cores, default=None), groups=tuple(groups)
    )


def number_of(text: str | None) -> int:
    """A positive number; 0 for anything else ("max", "-1", nothing)."""
    text = (text or "").strip()
    return int(text) if text.isdigit() else 0


def text_of(path: Path) -> str:
    """A file's text; empty when it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _memory_limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        limit = number_of(text_of(folder / name))
        if 0 < limit < _NO_LIMIT_BYTES:
            return limit
    return None


def _held_bytes(folder: Path) -> int:
    """In use, less what the kernel gives back when asked: clean pages of files."""
    held = number_of(text_of(folder / "memory.current") or text_of(folder / "memory.usage_in_bytes"))
    for line in text_of(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return max(0, held - number_of(value))
    return held


def _quota_cores(folder: Path) -> int | None:
    quota, _, period = text_of(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = text_of(folder / "cpu.cfs_quota_us"), text_of(folder / "cpu.cfs_period_us")
    if not number_of(quota) or not number_of(period):
        return None
    return max(1, number_of(quota) // number_of(period))
