"""What a forward costs, learned from those that were run: a seconds for each position, and b for each batch.

Enters: positions of batches (images, or the tokens of texts with their padding) with their seconds. Leaves:
how much fits a time budget, how long a batch should take, whether two batches are better run as one, and when
one is stuck. One for each lane of the batcher.
"""

from __future__ import annotations

import math
from typing import Final

# Each batch counts this much less than the one after it: half after three.
_MEMORY: Final = 0.8
# A batch may be this much larger than any that was measured: costs jump where memory or caches end.
_GROWTH: Final = 4
_UNMEASURED_LIMIT_S: Final = 60.0
# Five seconds for a machine that stutters; fourfold for a trainer that takes the cores in between.
_STALL_BASE_S: Final = 5.0
_STALL_FACTOR: Final = 4.0
# Batches whose sizes differ by less than this part of their mean tell no slope.
_LEAST_SPREAD: Final = 0.1


class Cost:
    """Least squares over decayed sums; one size alone gives the ratio, and no fixed part."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._n = 0.0
        self._nn = 0.0
        self._s = 0.0
        self._ns = 0.0
        self._items = 0.0
        self._largest_items = 0
        self._largest_positions = 0
        self._cap: int | None = None

    @property
    def item_s(self) -> float | None:
        """Seconds an item, its share of the fixed part included. None before the first measurement."""
        return self._s / self._items if self._items else None

    @property
    def line(self) -> tuple[float, float]:
        """(a, b): seconds of a position, seconds of a batch. (0, 0) before the first measurement."""
        if not self._n:
            return 0.0, 0.0
        ratio = self._s / self._n
        mean_n, mean_s = self._n / self._weight, self._s / self._weight
        variance = self._nn / self._weight - mean_n**2
        if variance <= (_LEAST_SPREAD * mean_n) ** 2:
            return ratio, 0.0
        slope = (self._ns / self._weight - mean_n * mean_s) / variance
        if not 0.0 < slope < ratio:
            return ratio, 0.0
        return slope, mean_s - slope * mean_n

    def record(self, items: int, seconds: float, positions: int | None = None) -> None:
        """A forward of `items` took `seconds`. `positions`: of all of them, padding included."""
        n = items if positions is None else positions
        self._weight = _MEMORY * self._weight + 1.0
        self._n = _MEMORY * self._n + n
        self._nn = _MEMORY * self._nn + n * n
        self._s = _MEMORY * self._s + seconds
        self._ns = _MEMORY * self._ns + n * seconds
        self._items = _MEMORY * self._items + items
        self._largest_items = max(self._largest_items, items)
        self._largest_positions = max(self._largest_positions, n)

    def limit(self, items: int) -> None:
        """A batch larger than `items` does not fit the device's memory."""
        self._cap = max(1, items)

    def seconds(self, positions: int) -> float:
        """How long a batch should take; 0 before the first measurement."""
        a, b = self.line
        return a * positions + b

    def queue_seconds(self, items: int, batch_items: int) -> float:
        """How long so many items take, in batches of so many, if they are as long as those before."""
        if not self._items or not items:
            return 0.0
        a, b = self.line
        return a * items * self._n / self._items + b * math.ceil(items / batch_items)

    def batch_items(self, budget_s: float, max_items: int) -> int:
        """Items of the next batch at most, so that it takes about `budget_s`; at least 1."""
        limits = [max_items, _GROWTH * max(1, self._largest_items)]
        if self._items:
            a, b = self.line
            per_item = a * self._n / self._items
            if per_item > 0:
                limits.append(int(_room_s(budget_s, b) / per_item))
        if self._cap is not None:
            limits.append(self._cap)
        return max(1, min(limits))

    def batch_positions(self, budget_s: float) -> int:
        """Positions that take about `budget_s`. Before the first measurement as many as there are."""
        a, b = self.line
        if a <= 0:
            return 2**62
        return max(1, min(int(_room_s(budget_s, b) / a), _GROWTH * self._largest_positions))

    def worth_padding(self, positions: int) -> bool:
        """Whether so much padding costs less than a batch more."""
        a, b = self.line
        return a * positions <= b

    def stall_limit_s(self, positions: int) -> float:
        """A forward of so many positions that takes longer than this does not come back."""
        if not self._n:
            return _UNMEASURED_LIMIT_S
        return _STALL_BASE_S + _STALL_FACTOR * self.seconds(positions)


def _room_s(budget_s: float, batch_s: float) -> float:
    """For the positions of a batch. Where the fixed part alone uses up the budget, small batches would only
    pay it more often: then the positions may take as long as the fixed part, and at most the budget."""
    return max(budget_s - batch_s, min(batch_s, budget_s))
