"""The image size of a step, and how much its images are changed: a pure function of the step.

Enters: a step. Leaves: a `Look`. Called by the loader, far ahead of the step, and by the stepper. What is
drawn is drawn from (seed, step) alone: all ranks see the same size, and a resumed run the sizes of the first
one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from cliptune_trainer.image.augment import NONE, Augmentation

Size: TypeAlias = tuple[int, int]  # height, width in pixels

# Draws come from streams of their own; see `assembly`.
_SIZE_STREAM: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How images look to one step.

    Attributes:
        size: (height, width) in pixels.
        augmentation: of the images.
        strength: of stochastic depth and the like, as a share of what the model has.
    """

    size: Size
    augmentation: Augmentation
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Steps that are alike, from the end of the stage before up to `until`.

    Attributes:
        until: the first step beyond it, counted from 0.
        sizes: one of them is drawn for each step.
        augmentation, strength: as in `Look`.
    """

    until: int
    sizes: tuple[Size, ...]
    augmentation: Augmentation = NONE
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeSchedule:
    """Stages one after the other.

    Attributes:
        stages: none is empty; the last one's `until` is the number of steps.
        target: that the model is evaluated and served at.
        seed: of what is drawn.
    """

    stages: tuple[Stage, ...]
    target: Size
    seed: int = 0

    @classmethod
    def fixed(cls, size: Size, augmentation: Augmentation, total_steps: int) -> SizeSchedule:
        """One size throughout."""
        return cls(stages=(Stage(until=total_steps, sizes=(size,), augmentation=augmentation),), target=size)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All that a step may see, the smallest first."""
        found = {size for stage in self.stages for size in stage.sizes}
        return tuple(sorted(found, key=lambda size: (size[0] * size[1], size)))

    @property
    def largest(self) -> Size:
        """What takes the most memory."""
        return self.sizes[-1]

    def at(self, step: int) -> Look:
        """Of the step after `step` finished ones."""
        place = bisect_right([stage.until for stage in self.stages], step)
        stage = self.stages[min(place, len(self.stages) - 1)]
        size = stage.sizes[0]
        if len(stage.sizes) > 1:
            size = stage.sizes[
                int(np.random.default_rng([self.seed, step, _SIZE_STREAM]).integers(len(stage.sizes)))
            ]
        return Look(size=size, augmentation=stage.augmentation, strength=stage.strength)

    def left(self, step: int) -> dict[Size, float]:
        """Steps of each size after `step` finished ones, as may be expected: draws are even."""
        found: dict[Size, float] = {}
        began = step
        for stage in self.stages:
            for size in stage.sizes if stage.until > began else ():
                found[size] = found.get(size, 0.0) + (stage.until - began) / len(stage.sizes)
            began = max(began, stage.until)
        return found

    def mean(self, cost: Callable[[Size], float]) -> float:
        """Of a step, over all stages: what a step at a size costs, as it may be expected."""
        left = self.left(0)
        return sum(steps * cost(size) for size, steps in left.items()) / max(self.stages[-1].until, 1)
