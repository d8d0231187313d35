"""The learning rate of a step: a shape in [0, 1] times the peak.

Enters: a step and the run's length. Leaves: a share of the peak. Called by the loop. The shape is a pure
function of the step, so there is no scheduler state to restore. The peak is a history that a command may add
to; it lives in a file of the job, so that a resumed run repeats every change at the step where it was made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cliptune.durable import write_atomically

# Each maps progress after warm-up, 0 to 1, to a share of the peak.
SHAPES: Final[dict[str, Callable[[float], float]]] = {
    # Loshchilov & Hutter 2017 (SGDR), Eq. 5 with eta_min = 0 and one period.
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linear warm-up over the first share of the steps, then a named shape down to the end."""

    shape: str
    total_steps: int
    warmup_fraction: float

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return math.ceil(self.warmup_fraction * self.total_steps)

    def share(self, step: int) -> float:
        """Share of the peak for the step after `step` finished ones. Never 0 before the end."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return SHAPES[self.shape](min(progress, 1.0))


class PeakHistory:
    """The peak learning rate by step, as commands changed it. Kept in `path` (JSON)."""

    def __init__(self, path: Path, initial: float) -> None:
        self._path = path
        self._changes: list[tuple[int, float]] = [(0, initial)]
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self._changes += [(int(step), float(peak)) for step, peak in stored["changes"]]

    def at(self, step: int) -> float:
        """The peak for the step after `step` finished ones."""
        return next(peak for since, peak in reversed(self._changes) if since <= step)

    def change(self, step: int, peak: float) -> None:
        """From `step` finished steps on, the peak is this one. On disk when this returns, else OSError."""
        later = [(since, value) for since, value in self._changes[1:] if since < step] + [(step, peak)]
        write_atomically(self._path, json.dumps({"changes": later}).encode())
        self._changes[1:] = later
