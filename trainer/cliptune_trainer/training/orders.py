"""What the daemon says, carried out between two steps.

Enters: instructions from the inbox. Leaves: their effects, an answer to each, and the attempt's end if that
was asked for. Called by the loop.
"""

from __future__ import annotations

import math
import time
from typing import Final, Protocol

from cliptune.errors import CliptuneError, DiskFullError, InvalidInputError, JobStateError
from cliptune.internal.v1 import trainer_pb2
from cliptune_trainer.reporting.commands import Inbox, command_name
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.training.hold import Ending, attempt_write

MAX_YIELD_S: Final = 60.0


class Actions(Protocol):
    """What a training can be told to do."""

    def settle(self) -> None:
        """Wait for the step that is on its way."""

    def save(self) -> None:
        """Write a checkpoint."""

    @property
    def saved(self) -> bool:
        """The newest checkpoint is of this step."""

    def hold(self, error: DiskFullError) -> Ending | None:
        """Stand still because the disk is full."""

    def evaluate_now(self) -> CliptuneError | None:
        """Measure; returns why it could not."""

    def set_learning_rate(self, learning_rate: float) -> CliptuneError | None:
        """Change the peak; returns why it could not."""


class Orders:
    """Obeys the inbox on behalf of `training`."""

    def __init__(self, inbox: Inbox, reporter: Reporter, training: Actions) -> None:
        self._inbox, self._reporter, self._training = inbox, reporter, training

    def obey(self) -> Ending | None:
        """Carries out what waits, and what comes while the device is left to inference.

        Returns:
            The attempt's end, if that was asked for.
        """
        resting_until_s = 0.0
        while True:
            instruction = self._inbox.next(max(0.0, resting_until_s - time.monotonic()))
            if instruction is None:
                return None
            self._training.settle()
            name = command_name(instruction)
            if name == "yield_to_inference":
                seconds = instruction.command.yield_to_inference.seconds
                error = _check_seconds(seconds)
                if error is None:
                    resting_until_s = time.monotonic() + seconds
                if instruction.command_id:  # without one it is the daemon's own doing
                    self._reporter.command_done(instruction.command_id, name, error)
            elif ending := self._carry_out(name, instruction):
                return ending

    def _carry_out(self, name: str, instruction: trainer_pb2.Instruction) -> Ending | None:
        if name == "suspend":
            return self._suspend()
        error = self._do(name, instruction)
        self._reporter.command_done(instruction.command_id, name, error)
        if isinstance(error, DiskFullError) and name in ("pause", "checkpoint"):
            return self._training.hold(error)
        if error is None and name == "pause":
            return Ending(outcome=trainer_pb2.OUTCOME_PAUSED)
        if error is None and name == "cancel":
            return Ending(outcome=trainer_pb2.OUTCOME_CANCELLED)
        return None

    def _suspend(self) -> Ending:
        if not self._training.saved and (error := attempt_write(self._training.save)):
            self._reporter.notice(
                "checkpoint-failed",
                f"{error.message}: the steps since the last checkpoint are repeated later",
            )
        return Ending(outcome=trainer_pb2.OUTCOME_SUSPENDED)

    def _do(self, name: str, instruction: trainer_pb2.Instruction) -> CliptuneError | None:
        """Does what can be done and the run goes on after; returns why not."""
        if name in ("pause", "checkpoint"):
            return attempt_write(self._training.save)
        if name == "cancel":
            return None
        if name == "evaluate":
            return self._training.evaluate_now()
        if name == "set_learning_rate":
            rate = instruction.command.set_learning_rate.learning_rate
            return self._training.set_learning_rate(rate)
        return JobStateError(f"the job is RUNNING: it cannot {name or 'do what was asked'}", state="RUNNING")


def _check_seconds(seconds: float) -> InvalidInputError | None:
    if math.isfinite(seconds) and 0.0 <= seconds <= MAX_YIELD_S:
        return None
    return InvalidInputError(f"seconds is {seconds:g}; allowed: 0 to {MAX_YIELD_S:g}", seconds=seconds)
