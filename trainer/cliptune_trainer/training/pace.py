"""How fast training goes.

Enters: finished steps. Leaves: samples a second and the seconds that are left. Called by the loop.
Evaluation and checkpoints are not counted: the loop says when it goes back to training.
"""

from __future__ import annotations

import time
from typing import Final

# Weight of the newest step in the running mean.
_NEWEST: Final = 0.1


class Pace:
    """A running mean over steps, and the throughput since the last report."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._mean_s = 0.0
        self._since_s = time.perf_counter()
        self._training_s = 0.0
        self._steps = 0

    def resume(self) -> None:
        """The next step begins now; what went before was no training."""
        self._since_s = time.perf_counter()

    def step_done(self) -> None:
        """A step ended; the next begins."""
        now_s = time.perf_counter()
        step_s, self._since_s = now_s - self._since_s, now_s
        self._mean_s = step_s if self._mean_s == 0.0 else (1 - _NEWEST) * self._mean_s + _NEWEST * step_s
        self._training_s += step_s
        self._steps += 1

    def samples_per_second(self) -> float:
        """Since this was last asked; at least one step must have been done."""
        rate = self._steps * self._batch_size / max(self._training_s, 1e-9)
        self._training_s, self._steps = 0.0, 0
        return rate

    def eta_s(self, steps_left: int) -> float:
        """Seconds of training left."""
        return steps_left * self._mean_s
