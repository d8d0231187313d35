"""Measuring sides in turns, so that whatever else the cores do meets all of them.

Enters: one function a side that does the thing once and returns its figure. Leaves: the median of each.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping


def medians(sides: Mapping[str, Callable[[], float]], repetitions: int, warm: int = 1) -> dict[str, float]:
    """Every side `warm` times unmeasured, then `repetitions` times measured, each round in another order."""
    order = list(sides)
    shuffle = random.Random(0).shuffle
    figures: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(-warm, repetitions):
        for side in order:
            figure = sides[side]()
            if turn >= 0:
                figures[side].append(figure)
        shuffle(order)
    return {side: statistics.median(found) for side, found in figures.items()}


def seconds(do: Callable[[], object]) -> Callable[[], float]:
    """How long `do` takes, in s."""

    def timed() -> float:
        began = time.perf_counter()
        do()
        return time.perf_counter() - began

    return timed
