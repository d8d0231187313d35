"""How steps are computed at each image size: a plan for every size that a run has.

Enters: what a planner needs, and the sizes. Leaves: `Executions`. Called by preparation and by `run`. The
largest size is planned first: it settles precision, loss and compilation for all, so that a change of size
changes no result but through the images. Micro-batch, attention and recomputation are each size's own; the
contrastive batch is the same everywhere, through exact accumulation, and so is the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.proven_sizes import Size, told
from cliptune_trainer.plan.execution import Execution
from cliptune_trainer.plan.planning import Planner
from cliptune_trainer.resolution.schedule import SizeSchedule
from cliptune_trainer.spec import Spec

_OF_A_SIZE = ("micro_batch_size", "attention", "checkpointing")


@dataclass(frozen=True, kw_only=True, slots=True)
class Executions:
    """Executions by (height, width). `largest`: the size whose plan says what all have in common."""

    by_size: Mapping[Size, Execution]
    largest: Size

    @property
    def common(self) -> Execution:
        """Of the largest size."""
        return self.by_size[self.largest]

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The largest size's, and what the others have otherwise."""
        common = {choice.subject: choice.value for choice in self.common.choices}
        others = tuple(
            replace(choice, subject=f"{choice.subject} at {told(size)}")
            for size, execution in self.by_size.items()
            if size != self.largest
            for choice in execution.plan.choices
            if choice.subject in _OF_A_SIZE and choice.value != common.get(choice.subject)
        )
        return (*self.common.choices, *others)

    def stored(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values."""
        return {
            **self.common.stored(),
            "sizes": {told(size): execution.stored() for size, execution in self.by_size.items()},
        }


def plan_sizes(
    planner: Callable[[Spec, Clip], Planner],
    spec: Spec,
    clip: Clip,
    schedule: SizeSchedule,
    stored: Mapping[str, Any] | None = None,
) -> Executions:
    """A plan for each size of the schedule.

    Args:
        planner: for a spec and a model at a size.
        spec: the job.
        clip: the model.
        schedule: of the sizes.
        stored: what a checkpoint keeps of `Executions`; None: plan anew.

    Raises:
        InvalidInputError: the device lacks the precision, or the largest images do not fit; it says what
            would.
        OverloadedError: they would fit, but others hold the device's memory now.
    """
    before = stored.get("sizes", {}) if stored else {}
    largest = schedule.largest
    first = planner(spec, clip.at(largest)).plan(before.get(told(largest), stored))
    settled = replace(spec, train=replace(spec.train, precision=first.precision))
    by_size = {
        size: first if size == largest else planner(settled, clip.at(size)).plan(before.get(told(size)))
        for size in schedule.sizes
    }
    return Executions(by_size=by_size, largest=largest)
