"""Training gives way to inference where both use one accelerator.

Enters: the traffic of requests, the engine's device. Leaves: requests to the trainers of that device to stand
still at the end of their step, each for a moment (a lease, so that nothing is left standing when the daemon
dies), renewed while there is traffic and taken back after it. On the CPU the operating system shares the
cores, and nothing is said. Run by `daemon.py`.

Inference that never stops must not stop a job for ever: after `longest_s` its trainer has a turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cliptune.errors import InvalidInputError
from cliptune_server.inference.traffic import Traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class YieldPace:
    """How often trainers are told, and how long they may be kept."""

    lease_s: float = 0.5
    """What one request to yield is good for."""
    renew_s: float = 0.2
    """Between two of them; and so long after the last answer training goes on."""
    longest_s: float = 8.0
    """In a row, before a turn."""
    turn_s: float = 2.0
    """Training for so long (at least one step) although there is traffic."""

    def __post_init__(self) -> None:
        if not 0 < self.renew_s < self.lease_s <= self.longest_s or self.turn_s <= 0:
            raise InvalidInputError(f"a pace needs 0 < renew_s < lease_s <= longest_s and a turn, not {self}")


class Yielding:
    """`tell(device, seconds)` asks that device's trainers to yield; 0 takes it back."""

    def __init__(
        self,
        traffic: Traffic,
        *,
        device: Callable[[], str],
        tell: Callable[[str, float], None],
        pace: YieldPace | None = None,
    ) -> None:
        self._traffic: Final = traffic
        self._device: Final = device
        self._tell: Final = tell
        self._pace: Final = pace or YieldPace()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._traffic.begun()
            device = self._device()
            if device in ("", "cpu"):
                await asyncio.sleep(self._pace.turn_s)  # another engine may have another device
            else:
                await self._hold(device)

    async def _hold(self, device: str) -> None:
        """From a first request to quiet, or to the trainers' turn."""
        pace, began_s = self._pace, time.monotonic()
        turn_s = 0.0
        while self._traffic.within(pace.renew_s):
            if time.monotonic() - began_s >= pace.longest_s:
                turn_s = pace.turn_s
                break
            self._tell(device, pace.lease_s)
            await asyncio.sleep(pace.renew_s)
        self._tell(device, 0.0)
        await asyncio.sleep(turn_s)
