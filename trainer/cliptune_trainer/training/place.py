"""Where a run stands: its step, what was measured and saved last, and so what is due.

Enters: a spec, the length of the run, the checkpoint to go on from. Leaves: what is to be done before the
next step. Kept by the loop. All of it follows from the step and two others, which a checkpoint holds.
"""

from __future__ import annotations

from typing import Final

from cliptune_trainer.spec import Spec
from cliptune_trainer.training.checkpoint import TrainingState

_NEVER: Final = -1


class Place:
    """Steps count from 0: `step` is how many are done.

    Args:
        spec: the job.
        total_steps: of the run.
        steps_per_epoch: whole batches of an epoch.
        measurable: there are rows to evaluate on.
        state: the checkpoint to go on from; None: from the first step.

    Attributes:
        step: the next one.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        total_steps: int,
        steps_per_epoch: int,
        measurable: bool,
        state: TrainingState | None,
    ) -> None:
        self.step = state.step if state else 0
        self._began: Final = self.step
        self._saved = state.step if state else _NEVER
        self._evaluated = int(state.counters.get("evaluated_step", _NEVER)) if state else _NEVER
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._measurable, self._publishes = measurable, spec.publishes
        self._epochs_between = spec.evaluation.every_epochs
        self._steps_between = spec.checkpoint.every_steps or steps_per_epoch

    @property
    def at_end(self) -> bool:
        """All steps are done."""
        return self.step == self._total_steps

    @property
    def epoch(self) -> int:
        """That the next step belongs to, from 0."""
        return self.step // self._steps_per_epoch

    @property
    def epoch_begins(self) -> bool:
        """The next step is the first of its epoch, or of this attempt."""
        return self.step == self._began or self.step % self._steps_per_epoch == 0

    @property
    def saved(self) -> bool:
        """The newest checkpoint is of this step."""
        return self._saved == self.step

    def save_done(self) -> None:
        """A checkpoint of this step is written."""
        self._saved = self.step

    def evaluation_done(self) -> None:
        """The occasion of this step has been measured."""
        self._evaluated = self.step

    def evaluation_due(self) -> str | None:
        """The occasion, if this step is one and it has not been measured yet."""
        if self._evaluated == self.step or not self._measurable:
            return None
        if self.step == 0:
            return "before"
        if self.at_end:
            return "after"
        epoch, index = divmod(self.step, self._steps_per_epoch)
        every = self._epochs_between
        return "during" if every and index == 0 and epoch % every == 0 else None

    def checkpoint_due(self) -> bool:
        """Whether one is written now."""
        if self.saved or self.step == 0:
            return False
        if self.at_end:
            return self._publishes  # otherwise nothing will be done with it
        return self.step % self._steps_between == 0

    def standstill_due(self) -> bool:
        """Whether something is done before the next step that needs the last one's outcome."""
        return self.at_end or self.evaluation_due() is not None or self.checkpoint_due()

    def state(self) -> dict[str, int]:
        """For a checkpoint, beside the step: JSON values."""
        return {"evaluated_step": self._evaluated}
