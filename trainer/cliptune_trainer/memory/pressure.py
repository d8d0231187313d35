"""Whether others need the memory that a training step takes.

Enters: nothing but what the system tells. Leaves: who is pressed, in words. Called by the loop between two
steps, at most once a second. On CUDA the GPU's memory counts; on a Mac, whose GPU shares the RAM, and on the
CPU it is the system's.
"""

from __future__ import annotations

import ctypes
import platform
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import torch

from cliptune_model.machine.container import text_of
from cliptune_model.machine.hardware import available_bytes, host

_INTERVAL_S: Final = 1.0
# Less than so much free, or than this share of all, and the next who asks gets nothing.
_LEAST_FREE_BYTES: Final = 256 << 20
_LEAST_FREE_SHARE: Final = 0.02
# Percent of the last ten seconds in which some process waited for memory (Linux).
_STALLED_PERCENT: Final = 20.0
# macOS: 1 normal, 2 warning, 4 critical.
_MACOS_WARNING: Final = 2
_PRESSURE_FILE: Final = Path("/proc/pressure/memory")


class Pressure:
    """Asks the system, not too often.

    Args:
        device: where the step runs.
        clock: seconds.
    """

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._clock = device, clock
        self._next_s = clock() + _INTERVAL_S

    def due(self) -> bool:
        """Whether it is time to look again."""
        if self._clock() < self._next_s:
            return False
        self._next_s = self._clock() + _INTERVAL_S
        return True

    def told(self) -> str:
        """Who is short of memory, for a person; empty: nobody."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return short_of("the GPU", free, total)
        if platform.system() == "Darwin":
            return macos_pressure(_macos_level())
        return short_of("the machine", available_bytes(), host().memory_bytes) or stalls(
            text_of(_PRESSURE_FILE)
        )


def short_of(what: str, free_bytes: int, total_bytes: int) -> str:
    """Says when less is free than a newcomer would need."""
    least = max(_LEAST_FREE_BYTES, int(total_bytes * _LEAST_FREE_SHARE))
    if free_bytes >= least:
        return ""
    return f"{what} has {free_bytes >> 20} MiB of {total_bytes >> 20} left"


def stalls(told: str) -> str:
    """Linux's /proc/pressure/memory: says when processes wait for memory."""
    match = re.search(r"^some avg10=([\d.]+)", told, re.MULTILINE)
    if match is None or float(match.group(1)) < _STALLED_PERCENT:
        return ""
    return f"processes wait for memory {float(match.group(1)):.0f} % of the time"


def macos_pressure(level: int) -> str:
    """macOS's own verdict: 1, 2 or 4; 0: unknown."""
    if level < _MACOS_WARNING:
        return ""
    return "macOS is short of memory" if level == _MACOS_WARNING else "macOS is critically short of memory"


def _macos_level() -> int:
    """`sysctl kern.memorystatus_vm_pressure_level`, without a process for it."""
    level, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"kern.memorystatus_vm_pressure_level"
    failed = _libc().sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else level.value


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
