"""How much inference is under way.

Enters: the begin and the end of each request, told by the router. Leaves: whether any is in flight, and when
one comes. Asked by `yielding.py`. Used on the event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Traffic:
    """Requests that wait for the engine or are worked on; canaries and heartbeats are not among them."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._ended_s = -float("inf")
        self._begun = asyncio.Event()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request."""
        self.in_flight += 1
        self._begun.set()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._ended_s = time.monotonic()
            if not self.in_flight:
                self._begun.clear()

    async def begun(self) -> None:
        """Returns while a request is in flight: at once, or when one comes."""
        await self._begun.wait()

    def within(self, seconds: float) -> bool:
        """Whether a request is in flight now, or was within the last `seconds`."""
        return self.in_flight > 0 or time.monotonic() - self._ended_s < seconds
