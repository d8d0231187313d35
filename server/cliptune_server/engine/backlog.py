"""What a stage has still to do, and how fast it does it.

Enters: items of requests as they come and go, and the seconds that items took. Leaves: how many are to be
done before a newcomer, and the pace. Kept by the decoder for its threads and by each lane for its device;
asked by `expectation.py`. Used on the event loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

# Each item counts this much less than the one after it: the last twenty or so tell the pace.
_MEMORY: Final = 0.95


class Backlog:
    """Items that are to be done, those that nobody waits for apart."""

    def __init__(self) -> None:
        self._interactive = 0
        self._bulk = 0

    def before(self, *, bulk: bool) -> int:
        """Items that are done before one that comes now: before what is interactive only its like."""
        return self._interactive + (self._bulk if bulk else 0)

    @contextmanager
    def expecting(self, items: int, *, bulk: bool) -> Iterator[Callable[[], None]]:
        """Around a request: its items count from its beginning. Gives what to call as each one is done;
        those for which it was not called are taken back at the end."""
        left = items

        def done() -> None:
            nonlocal left
            if left:
                left -= 1
                self._add(-1, bulk=bulk)

        self._add(items, bulk=bulk)
        try:
            yield done
        finally:
            taken_back, left = left, 0
            self._add(-taken_back, bulk=bulk)

    def _add(self, items: int, *, bulk: bool) -> None:
        if bulk:
            self._bulk += items
        else:
            self._interactive += items


class Stage:
    """Threads that take one item each, in front of the device."""

    def __init__(self, threads: int) -> None:
        self.backlog: Final = Backlog()
        self._threads: Final = threads
        self._seconds = 0.0
        self._items = 0.0

    def record(self, items: int, seconds: float) -> None:
        """One thread took `seconds` for `items`."""
        kept = _MEMORY**items
        self._seconds = kept * self._seconds + seconds
        self._items = kept * self._items + items

    @property
    def alone_s(self) -> float:
        """Seconds of one item on its thread; 0 before the first."""
        return self._seconds / self._items if self._items else 0.0

    @property
    def item_s(self) -> float:
        """Seconds between two items where all threads are busy; 0 before the first."""
        return self.alone_s / self._threads
