"""What a forward costs, learned from those that were run.

Enters: batch sizes with their seconds. Leaves: how many items fit a time budget, how long a batch should
take, and when one is stuck. One for each lane of the batcher.
"""

from __future__ import annotations

from typing import Final

# Each batch counts this much less than the one after it: half after three.
_MEMORY: Final = 0.8
# A batch may be this much larger than any that was measured: costs jump where memory or caches end.
_GROWTH: Final = 4
_UNMEASURED_LIMIT_S: Final = 60.0
# Five seconds for a machine that stutters; fourfold for a trainer that takes the cores in between.
_STALL_BASE_S: Final = 5.0
_STALL_FACTOR: Final = 4.0


class Cost:
    """Seconds an item, as the ratio of decayed sums, so that large batches count more than small ones."""

    def __init__(self) -> None:
        self._items = 0.0
        self._seconds = 0.0
        self._largest = 0
        self._cap: int | None = None

    @property
    def item_s(self) -> float | None:
        """Seconds an item. None before the first measurement."""
        return self._seconds / self._items if self._items else None

    def record(self, items: int, seconds: float) -> None:
        """A forward of `items` took `seconds`."""
        self._items = _MEMORY * self._items + items
        self._seconds = _MEMORY * self._seconds + seconds
        self._largest = max(self._largest, items)

    def limit(self, items: int) -> None:
        """A batch larger than `items` does not fit the device's memory."""
        self._cap = max(1, items)

    def batch_items(self, budget_s: float, max_items: int) -> int:
        """Items of the next batch at most, so that it takes about `budget_s`; at least 1."""
        limits = [max_items, _GROWTH * max(1, self._largest)]
        if self.item_s:
            limits.append(int(budget_s / self.item_s))
        if self._cap is not None:
            limits.append(self._cap)
        return max(1, min(limits))

    def stall_limit_s(self, items: int) -> float:
        """A forward of `items` that takes longer than this does not come back."""
        if self.item_s is None:
            return _UNMEASURED_LIMIT_S
        return _STALL_BASE_S + _STALL_FACTOR * items * self.item_s
