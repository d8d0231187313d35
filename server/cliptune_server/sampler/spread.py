"""A few rows of a table of unknown length, spread evenly over it, in one pass.

Enters: items in order. Leaves: at most so many of them with their numbers. Called by `rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def spread(items: Iterable[Item], count: int) -> tuple[list[tuple[int, Item]], int]:
    """(number from 1, item) of at most `count` items, the first among them, and how many there are in all.

    Every `stride`-th item is kept; whenever twice as many as asked for are, every second goes and the stride
    doubles.
    """
    kept: list[tuple[int, Item]] = []
    stride, total = 1, 0
    for total, item in enumerate(items, start=1):
        if count and (total - 1) % stride == 0:
            kept.append((total, item))
            if len(kept) == 2 * count:
                del kept[1::2]
                stride *= 2
    wanted = min(count, len(kept))
    return [kept[place * len(kept) // wanted] for place in range(wanted)], total
