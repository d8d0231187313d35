"""Steps that come through, whatever happens to the memory: the model set up for its plan, and kept going.

Enters: a model, its `Execution`, batches. Leaves: steps on their way on the device. Called by the loop.

When memory runs out the same step is taken again with half the micro-batch: the effective batch and the
result stay. When others are short of memory the micro-batch is halved between two steps. After a while
without trouble it grows back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from cliptune.errors import OverloadedError
from cliptune_model.attention import install
from cliptune_model.clip import Clip
from cliptune_model.proven_sizes import told
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.memory.micro_batch import MicroBatch
from cliptune_trainer.memory.plan import gib
from cliptune_trainer.memory.pressure import Pressure
from cliptune_trainer.plan.per_size import Executions
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.resolution.schedule import Look
from cliptune_trainer.spec import Spec
from cliptune_trainer.steps.checkpointing import disable_checkpointing, enable_checkpointing
from cliptune_trainer.steps.optim import load_state_tensors, state_tensors
from cliptune_trainer.steps.probing import LinearProbe
from cliptune_trainer.steps.step import StepInFlight, StepOutOfMemoryError, release_memory
from cliptune_trainer.steps.stochastic_depth import StochasticDepth
from cliptune_trainer.training.assembly import assemble

_log = logging.getLogger(__name__)
# A micro-batch whose activations take less than this is no help to anybody who is short of memory.
_WORTH_YIELDING_BYTES: Final = 256 << 20
_OBJECTIVE: Final = "objective:"
# What a smaller micro-batch changes, for a person.
_EXACT: Final = "the batch and its gradient stay the same"
_NORMALISED: Final = "the batch stays the same, but each part is normalised by its own statistics"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepperState:
    """What a checkpoint keeps: JSON values, and tensors on the CPU."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]


class Stepper:
    """The model in the form that its plan asks for, its optimizer, and how its steps are taken.

    A compiler that fails on the way costs the step another computation, from its beginning and uncompiled.

    Args:
        spec: the job.
        clip: the model, on its device, as planned for. Attention, checkpointing and compilation are put in.
        executions: the plans, one for each size of images.
        batch_size: pairs of a step.
        learning_rate: of the first step.
        reporter: takes notices.
        teacher: the model as training began, for objectives that need it; of the same device.
    """

    def __init__(
        self,
        spec: Spec,
        clip: Clip,
        executions: Executions,
        *,
        batch_size: int,
        learning_rate: float,
        reporter: Reporter,
        teacher: Clip | None = None,
    ) -> None:
        self._clip, self._executions, self._reporter = clip, executions, reporter
        execution = executions.common
        plan = execution.plan
        self._size, self._plan = executions.largest, plan
        assembly = assemble(
            spec, clip, executions, batch_size=batch_size, learning_rate=learning_rate, teacher=teacher
        )
        self._take_step, self._optimizer = assembly.step, assembly.optimizer
        self._objective, self._precision = assembly.objective, assembly.precision
        self._compilation = assembly.compilation
        self._stays = _EXACT if assembly.exact_in_parts else _NORMALISED
        self._probe = LinearProbe(clip.model) if spec.train.probe_fraction else None
        self._stochastic_depth = StochasticDepth(clip.model)
        self._compiles = execution.policy.compiles
        self._tell_if_uncompiled()
        self._micro_batches = {
            size: MicroBatch(planned.plan.micro_batch_size) for size, planned in executions.by_size.items()
        }
        self._pressure = Pressure(clip.device)
        # Weights, gradients and moments stay whatever the micro-batch is.
        self._kept_bytes = sum(
            (16 if weight.requires_grad else 4) * weight.numel() for weight in clip.model.parameters()
        )

    @property
    def micro_batch_size(self) -> int:
        """Pairs that go through the towers at once, now."""
        return self._micro_batch.size

    @property
    def _micro_batch(self) -> MicroBatch:
        """Of the size that images have now."""
        return self._micro_batches[self._size]

    def turn_to(self, look: Look) -> None:
        """Sets the model up for images of another size; costs nothing where they are as before."""
        self._stochastic_depth.scale(look.strength)
        if look.size == self._size:
            return
        before, plan = self._plan, self._executions.by_size[look.size].plan
        self._size, self._plan = look.size, plan
        if plan.attention_plan != before.attention_plan:
            install(self._clip.model, plan.attention_plan)
        if plan.checkpointing != before.checkpointing:
            (enable_checkpointing if plan.checkpointing else disable_checkpointing)(self._clip)

    def launch(self, batch: Batch, learning_rate: float, *, probing: bool = False) -> StepInFlight:
        """Takes a step, at a smaller micro-batch if need be. `probing`: of the projections alone.

        Raises:
            OverloadedError: not even one pair at a time fits any more.
        """
        self._look_around()
        while True:
            self._take_step.micro_batch_size = self._micro_batch.size
            try:
                with self._probe.probing() if self._probe and probing else nullcontext():
                    flight = self._take_step.launch(batch, learning_rate)
            except StepOutOfMemoryError as error:
                self._halve(str(error))
            else:
                self._micro_batch.step_done()
                self._tell_if_uncompiled()
                return flight

    def _tell_if_uncompiled(self) -> None:
        """Once, when the compiler has failed."""
        if self._compiles and not self._compilation.on:
            self._compiles = False
            reason = self._compilation.choice.reason
            self._compilation.stop(reason)
            self._reporter.notice("not-compiled", f"the towers run uncompiled: {reason}")

    def _halve(self, why: str) -> None:
        before = self._micro_batch.size
        if not self._micro_batch.halve():
            plan = self._plan
            raise OverloadedError(
                f"a step no longer fits in the memory of {self._clip.device}, not even with one pair at once"
                f" ({gib(plan.estimated_bytes)} planned within {gib(plan.budget_bytes)}): other processes"
                f" hold it, or the model is too large; try a smaller one ({why})"
            )
        self._reporter.notice(
            "micro-batch-halved",
            f"{before} pairs at once did not fit in the memory of {self._clip.device}:"
            f" {self._micro_batch.size} now; {self._stays}",
        )

    def _look_around(self) -> None:
        """Between two steps: gives way to others that are short of memory, or takes up room again."""
        if not self._pressure.due():
            return
        if self._micro_batch.may_grow:
            if not self._pressure.told():
                self._micro_batch.grow()
                _log.info("micro-batch of %d pairs again", self._micro_batch.size)
        elif self._micro_batch.size > 1:
            pair_bytes = max(0, self._plan.estimated_bytes - self._kept_bytes) // self._plan.micro_batch_size
            taken = self._micro_batch.size * pair_bytes
            if taken >= _WORTH_YIELDING_BYTES and (why := self._pressure.told()):
                before = self._micro_batch.size
                self._micro_batch.halve()
                release_memory(self._clip.device)
                self._reporter.notice(
                    "memory-pressure",
                    f"{why}: {self._micro_batch.size} pairs at once instead of {before}; {self._stays}",
                )

    def told(self) -> str:
        """What the objective has learned beside the model, for a person; "": nothing."""
        return self._objective.told()

    def state(self) -> StepperState:
        """For a checkpoint: what the next steps depend on. Waits for the device."""
        scaler = self._precision.scaler
        return StepperState(
            values={
                "scaler": scaler.state_dict() if scaler else None,
                "execution": self._executions.stored(),
                "micro_batches": {told(size): one.state() for size, one in self._micro_batches.items()},
            },
            tensors={
                name: tensor.detach().cpu().contiguous()
                for name, tensor in (
                    *state_tensors(self._optimizer).items(),
                    *((_OBJECTIVE + name, one) for name, one in self._objective.state_dict().items()),
                )
            },
        )

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(_OBJECTIVE)}
        self._objective.load_state_dict(
            {name.removeprefix(_OBJECTIVE): tensor for name, tensor in own.items()}
        )
        load_state_tensors(
            self._optimizer, {name: tensor for name, tensor in tensors.items() if name not in own}
        )
        if self._precision.scaler is not None and values["scaler"] is not None:
            self._precision.scaler.load_state_dict(values["scaler"])
        stored = values.get("micro_batches", {})
        if "micro_batch" in values:  # of a checkpoint that knew one size
            stored = {told(self._executions.largest): values["micro_batch"]}
        for size, planned in self._micro_batches.items():
            before = MicroBatch.of(stored[told(size)]) if told(size) in stored else planned
            if before.planned == planned.planned:  # planned anew, on another device: nothing is known of it
                self._micro_batches[size] = before
