"""Changes of what is served: one at a time, and to their end.

Enters: the work of a change. Leaves: its result, also when the caller that asked for it has gone meanwhile.
Used by `models.py`, on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from cliptune.errors import CliptuneError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Changes:
    """Runs them."""

    def __init__(self) -> None:
        self.alone: Final = asyncio.Lock()
        """Held by the one that runs."""
        self.tasks: Final[set[asyncio.Task[Any]]] = set()

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a change after the ones before it, to its end even if the caller is cancelled meanwhile."""

        async def alone() -> Result:
            async with self.alone:
                return await work

        task = asyncio.create_task(alone())
        self.tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, CliptuneError):
            log.error("a change of models failed", exc_info=error)
