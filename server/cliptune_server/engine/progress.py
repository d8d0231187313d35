"""What the engine's threads are doing, and for how long they may.

Enters: work that begins, with the longest time it can honestly take. Leaves: the age of the work that is
nearest to its limit, which the daemon's heartbeat asks for: work beyond its limit means that the engine is
stuck.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cliptune.errors import InvalidInputError

_IDLE_LIMIT_S: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """Age and limit of one piece of work; age 0 when idle."""

    age_s: float = 0.0
    limit_s: float = _IDLE_LIMIT_S


class Progress:
    """Written by any thread, read by the event loop. A dict's single operations are atomic, so there is no
    lock that a stuck thread could hold."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._running: dict[int, tuple[float, float]] = {}

    @contextmanager
    def working(self, limit_s: float) -> Iterator[None]:
        """Around a piece of work, in the thread that does it."""
        if limit_s <= 0:
            raise InvalidInputError(f"a limit must be above 0 s, not {limit_s}")
        number = next(self._ids)
        self._running[number] = (time.monotonic(), limit_s)
        try:
            yield
        finally:
            del self._running[number]

    def worst(self) -> Running:
        """The work that has used most of its limit."""
        now_s = time.monotonic()
        works = (
            Running(age_s=now_s - began_s, limit_s=limit_s)
            for began_s, limit_s in list(self._running.values())
        )
        return max(works, key=lambda work: work.age_s / work.limit_s, default=Running())
