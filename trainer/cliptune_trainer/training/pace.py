"""How fast training goes.

Enters: finished steps. Leaves: samples a second and the seconds that are left. Called by the loop.
Evaluation and checkpoints are not counted: the loop says when it goes back to training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from cliptune_trainer.resolution.schedule import Size, SizeSchedule

# Weight of the newest step in the running mean.
_NEWEST: Final = 0.1


class Pace:
    """A running mean over the steps of each image size, and the throughput since the last report.

    Args:
        batch_size: samples of a step.
        sizes: of the images of every step.
        clock: seconds that never go back.
    """

    def __init__(
        self, batch_size: int, sizes: SizeSchedule, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._batch_size: Final = batch_size
        self._sizes: Final = sizes
        self._clock: Final = clock
        self._mean_s: Final[dict[Size, float]] = {}
        self._since_s = clock()
        self._training_s = 0.0
        self._steps = 0

    def resume(self) -> None:
        """The next step begins now; what went before was no training."""
        self._since_s = self._clock()

    def step_done(self, step: int) -> None:
        """The step ended, counted from 1; the next begins."""
        now_s = self._clock()
        step_s, self._since_s = now_s - self._since_s, now_s
        size = self._sizes.at(step - 1).size
        known_s = self._mean_s.get(size, step_s)
        self._mean_s[size] = (1 - _NEWEST) * known_s + _NEWEST * step_s
        self._training_s += step_s
        self._steps += 1

    def samples_per_second(self) -> float:
        """Since this was last asked; at least one step must have been done."""
        rate = self._steps * self._batch_size / max(self._training_s, 1e-9)
        self._training_s, self._steps = 0.0, 0
        return rate

    def eta_s(self, step: int) -> float:
        """Seconds of training left after `step` finished ones, of which at least one was seen."""
        return sum(steps * self._step_s(size) for size, steps in self._sizes.left(step).items())

    def _step_s(self, size: Size) -> float:
        """Of a size that no step had yet: by its pixels, from the seen one that is nearest."""
        if size in self._mean_s:
            return self._mean_s[size]
        nearest = min(self._mean_s, key=lambda seen: abs(_pixels(seen) - _pixels(size)))
        return self._mean_s[nearest] * _pixels(size) / _pixels(nearest)


def _pixels(size: Size) -> int:
    return size[0] * size[1]
