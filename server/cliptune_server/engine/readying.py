"""Faster forms of a model's towers, made beside its requests once it serves.

Enters: what makes them (`Towers.freeze`). Leaves: nothing; the towers compute by the faster form once that
has proved itself, and say in `form` what they compute by. Started by `models.py` when a model has answered
its canary, stopped when it is unloaded. One thread with low priority does it, a model at a time, so that
neither readiness nor a request waits for it. (Small models are frozen while they are loaded.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

_log = logging.getLogger(__name__)

# Below whatever else the machine does; Linux has such a number for each thread.
_NICENESS: Final = 10


class Readying:
    """`begin` with a model's towers, `end` with the model."""

    def __init__(self) -> None:
        self._thread: Final = ThreadPoolExecutor(1, thread_name_prefix="ready", initializer=_yield_to_others)
        self._unwanted: Final[dict[str, threading.Event]] = {}
        self._tasks: Final[dict[str, asyncio.Task[None]]] = {}

    def begin(
        self,
        key: str,
        work: Callable[[Callable[[], bool]], None],
        then: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Has `work` done; it asks the function that it is given whether nobody wants it any more.

        `then`: afterwards, on the event loop, again and again while it says True.
        """
        unwanted = self._unwanted[key] = threading.Event()

        async def run() -> None:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, work, unwanted.is_set)
                while then is not None and not unwanted.is_set() and await then():
                    pass
            except Exception:  # whatever a faster form fails with, the model serves as it is
                _log.exception("no faster form of model %s was made", key)

        self._tasks[key] = asyncio.create_task(run(), name=f"ready-{key}")

    async def settled(self, key: str) -> None:
        """Returns when nothing is being made for this model any more."""
        task = self._tasks.get(key)
        if task is not None:
            await asyncio.shield(task)

    async def end(self, key: str) -> None:
        """Stops what is being made for this model: nothing of it is held any more when this returns."""
        unwanted = self._unwanted.pop(key, None)
        if unwanted is not None:
            unwanted.set()
            await self.settled(key)
            self._tasks.pop(key, None)

    def close(self) -> None:
        """Does not wait."""
        for unwanted in self._unwanted.values():
            unwanted.set()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _yield_to_others() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
