"""What came of the steps: progress for the curves, and a judgement on steps that came to nothing.

Enters: steps that the device has been given. Leaves: events; an error when too many in a row change no
weight. Called by the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from cliptune.errors import InvalidInputError
from cliptune.v1 import job_pb2
from cliptune_model.machine.device import device_memory_bytes
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.steps.step import StepInFlight, StepResult
from cliptune_trainer.training.pace import Pace

# Steps in a row whose loss or gradient may be no finite number, those not counted that fp16's scale takes.
MAX_SKIPPED_IN_ROW: Final = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderWay:
    """A step that the device has been given; `step` counts from 1."""

    flight: StepInFlight
    step: int
    learning_rate: float
    micro_batch_size: int
    image_size: int = 0


class Outcomes:
    """Tells what came of the steps of one run.

    Args:
        reporter: takes the events.
        pace: how fast training goes.
        device: of the model.
        total_steps: of the run.
        steps_per_epoch: whole batches of an epoch.
        every_steps: how often progress is told.
        counters: of the checkpoint to go on from.
    """

    def __init__(
        self,
        reporter: Reporter,
        pace: Pace,
        device: torch.device,
        *,
        total_steps: int,
        steps_per_epoch: int,
        every_steps: int,
        counters: Mapping[str, Any],
    ) -> None:
        self._reporter, self._pace, self._device = reporter, pace, device
        self._total_steps, self._steps_per_epoch, self._every = total_steps, steps_per_epoch, every_steps
        self._in_row = int(counters.get("skipped_in_row", 0))
        self._skipped = int(counters.get("skipped_steps", 0))

    def tell(self, done: UnderWay) -> None:
        """Waits for a step and tells of it.

        Raises:
            InvalidInputError: `MAX_SKIPPED_IN_ROW` steps in a row changed no weight.
        """
        result = done.flight.result()
        self._pace.step_done(done.step)
        if result.skipped:
            self._skip(done.step, result)
            return
        self._in_row = 0
        if done.step % self._every and done.step != self._total_steps:
            return
        self._reporter.progress(
            job_pb2.Progress(
                step=done.step,
                total_steps=self._total_steps,
                epoch=done.step / self._steps_per_epoch,
                loss=result.loss,
                learning_rate=done.learning_rate,
                logit_scale=result.logit_scale,
                gradient_norm=result.gradient_norm,
                samples_per_second=self._pace.samples_per_second(),
                device_memory_bytes=device_memory_bytes(str(self._device)),
                eta_seconds=self._pace.eta_s(done.step),
                micro_batch_size=done.micro_batch_size,
                loss_scale=result.loss_scale,
                skipped_steps=self._skipped,
                image_size=done.image_size,
            )
        )

    def _skip(self, step: int, result: StepResult) -> None:
        self._skipped += 1
        what = "gradient" if math.isfinite(result.loss) else "loss"
        where = f": {result.culprit}" if result.culprit else ""
        if result.loss_scale > 0 and not where:
            # As fp16 goes: its scale is found by trying. At its floor the step itself raises.
            told = f"a gradient overflows fp16 at a loss scale of {result.loss_scale:g}: it is halved"
            self._reporter.notice(
                "step-skipped", f"step {step}: {told}, no weight was changed", warning=False
            )
            return
        self._in_row += 1
        if self._in_row >= MAX_SKIPPED_IN_ROW:
            raise InvalidInputError(
                f"the {what} was no finite number in {self._in_row} steps in a row, up to step {step}{where};"
                " lower train.learning_rate, or use train.precision = 'fp32'",
                step=step,
            )
        told = f"the {what} is no finite number; no weight was changed{where}"
        self._reporter.notice("step-skipped", f"step {step}: {told}")

    def state(self) -> dict[str, int]:
        """For a checkpoint: JSON values."""
        return {"skipped_in_row": self._in_row, "skipped_steps": self._skipped}
