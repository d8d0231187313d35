"""Copies of answered requests to a version that is on trial: what it would have done is counted, not told.

Enters: a request that was answered, and the key of the shadow. Leaves: nothing; outcomes are counted by key.
Used by `router.py`. Copies are bulk, so that whatever somebody waits for goes first, and there are few of
them at a time: beyond that they are dropped, and counted as such.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from cliptune.errors import CliptuneError

_AT_A_TIME: Final = 16

log = logging.getLogger(__name__)


class Shadowing:
    """Runs the copies."""

    def __init__(self) -> None:
        self.outcomes: Final[Counter[tuple[str, str]]] = Counter()
        """(key, "ok" | "failed" | "dropped") → how many."""
        self._running: Final[set[asyncio.Task[None]]] = set()

    def send(self, key: str, ask: Callable[[], Awaitable[object]]) -> None:
        """Asks the shadow in the background, if there is room."""
        if len(self._running) >= _AT_A_TIME:
            self.outcomes[key, "dropped"] += 1
            return
        task = asyncio.create_task(self._ask(key, ask), name=f"shadow-{key}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settled(self) -> None:
        """Returns when no copy is under way."""
        while self._running:
            await asyncio.wait(self._running)

    async def _ask(self, key: str, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            await ask()
        except CliptuneError as error:
            self.outcomes[key, "failed"] += 1
            log.info("the shadow %s failed: %s", key, error.message)
        except Exception:
            self.outcomes[key, "failed"] += 1
            log.exception("the shadow %s failed", key)
        else:
            self.outcomes[key, "ok"] += 1
