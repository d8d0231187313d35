"""The micro-batch over the course of a run: halved when memory runs short, grown again with care.

Enters: steps that did or did not fit. Leaves: the size for the next step, and what to tell. Called by the
loop. The effective batch, and so the result, is the same at every size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self

# Steps without trouble before a larger size is tried; doubled each time that it does not fit.
PATIENCE_STEPS: Final = 50
_MOST_PATIENCE_STEPS: Final = 50 << 10


class MicroBatch:
    """Never above `planned`, never below 1.

    Attributes:
        size: pairs for the next step.
        planned: pairs that there may be at most.
    """

    def __init__(self, planned: int) -> None:
        self.size = planned
        self.planned = planned
        self._patience = PATIENCE_STEPS
        self._quiet_steps = 0
        self._grown = False

    @property
    def reduced(self) -> bool:
        """It is below what was planned."""
        return self.size < self.planned

    def halve(self) -> bool:
        """After a step that did not fit, or when others need memory; False: it is 1 already."""
        self._quiet_steps = 0
        if self._grown:  # in vain: wait longer before the next try
            self._patience = min(2 * self._patience, _MOST_PATIENCE_STEPS)
            self._grown = False
        if self.size == 1:
            return False
        self.size = -(-self.size // 2)
        return True

    def step_done(self) -> None:
        """A step fitted."""
        self._quiet_steps += 1
        if self._quiet_steps >= self._patience:
            self._grown = False  # the last growth has proved itself

    @property
    def may_grow(self) -> bool:
        """It is reduced, and has fitted for long enough to try the double."""
        return self.reduced and self._quiet_steps >= self._patience

    def grow(self) -> None:
        """To the double, at most to what was planned."""
        self.size = min(2 * self.size, self.planned)
        self._quiet_steps, self._grown = 0, True

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON values."""
        return {
            "size": self.size,
            "planned": self.planned,
            "patience": self._patience,
            "quiet_steps": self._quiet_steps,
            "grown": self._grown,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Inverse of `state`."""
        micro_batch = cls(int(state["planned"]))
        micro_batch.size = int(state["size"])
        micro_batch._patience = int(state["patience"])
        micro_batch._quiet_steps = int(state["quiet_steps"])
        micro_batch._grown = bool(state["grown"])
        return micro_batch
