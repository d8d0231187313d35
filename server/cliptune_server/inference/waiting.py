"""Requests for a model that is being loaded wait for it a while instead of being turned away.

Enters: the `model` of a request and the moment at which its caller's time is over. Leaves: the key of a
loaded version. Asked by `router.py`. How many wait at once is bounded, for each keeps its images; the others
are told at once that the model is being loaded and when to ask again.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from cliptune.errors import UnavailableError
from cliptune_server.inference.pins import Catalog

PATIENCE_S: Final = 20.0
"""Longer waits nobody: a start with cold files takes a few seconds."""
ROOM: Final = 32
"""Requests that wait at once."""


class Resolving(Protocol):
    """A catalog, or one stream's view of it."""

    async def resolve(self, reference: str) -> str:
        """Key of a loaded version. `UnavailableError`: it is being loaded."""
        ...


class Waiting:
    """One daemon's."""

    def __init__(self, catalog: Catalog, *, patience_s: float = PATIENCE_S, room: int = ROOM) -> None:
        self._catalog: Final = catalog
        self._patience_s: Final = patience_s
        self._room: Final = room
        self._waiting = 0

    async def resolve(self, resolving: Resolving, reference: str, deadline_s: float | None) -> str:
        """As `resolving` does, once the model is there.

        Args:
            deadline_s: by `time.monotonic`; none: the caller has time.

        Raises:
            UnavailableError: it is still being loaded when patience or time are over, or too many wait.
        """
        until_s = time.monotonic() + self._patience_s
        if deadline_s is not None:
            until_s = min(until_s, deadline_s)
        while True:
            try:
                return await resolving.resolve(reference)
            except UnavailableError:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or self._waiting >= self._room:
                    raise
                self._waiting += 1
                try:
                    async with asyncio.timeout(left_s):
                        await self._catalog.changed()
                except TimeoutError:
                    continue  # asked a last time
                finally:
                    self._waiting -= 1
