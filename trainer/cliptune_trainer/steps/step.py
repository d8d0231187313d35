"""One optimisation step: batch → towers → loss → gradients → weights.

Enters: a `Batch` and a learning rate. Leaves: a `StepResult`. Called by the loop.

Between entry and the last operation the host reads nothing from the device: whether a number is finite, how
far to clip, and the next loss scale are decided there, and a bad step is left out by the fused optimizer. The
one reading of all figures comes at the end, or when the loop asks, a step later if it likes.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, cast

import torch
from torch import Tensor
from torch.optim import AdamW

from cliptune.errors import InvalidInputError
from cliptune_model.acceleration.compiled import Compilation
from cliptune_model.clip import Clip
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.out_of_memory import is_out_of_memory
from cliptune_trainer.steps.accumulation import accumulate, contrastive_loss
from cliptune_trainer.steps.batch_norm import BatchNorms
from cliptune_trainer.steps.half_weights import HalfWeights
from cliptune_trainer.steps.nan_guard import Culprit, NanGuard
from cliptune_trainer.steps.optim import set_learning_rate
from cliptune_trainer.steps.precision import LossScaler, Precision
from cliptune_trainer.steps.replay import RandomState
from cliptune_trainer.steps.teacher import StartingModel

__all__ = ["Step", "StepInFlight", "StepOutOfMemoryError", "StepResult", "contrastive_loss"]

# As torch.nn.utils.clip_grad_norm_: a norm of 0 divides nothing by 0.
_NORM_EPS: Final = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What came of a step.

    Attributes:
        loss: over the whole batch.
        gradient_norm: before clipping, of the gradient without loss scale.
        logit_scale: exp of the parameter, after the step.
        skipped: loss or gradient was not finite and nothing was changed but the loss scale.
        loss_scale: by which the loss was multiplied; 0: it was not.
        culprit: of a skipped step, where the first bad number came from; None: fp16's scale was too large.
    """

    loss: float
    gradient_norm: float
    logit_scale: float
    skipped: bool
    loss_scale: float = 0.0
    culprit: Culprit | None = None


class StepOutOfMemoryError(Exception):
    """A step did not fit. It left no trace: the same step can be taken again with a smaller micro-batch.

    `micro_batch_size` is the one that did not fit; the message is the device's.
    """

    def __init__(self, micro_batch_size: int, message: str) -> None:
        super().__init__(message)
        self.micro_batch_size = micro_batch_size


@dataclass(slots=True)
class StepInFlight:
    """A step that the device has been given. `result` waits for it, once."""

    _values: Tensor
    _copied: torch.cuda.Event | None
    _finish: Callable[[list[float]], StepResult]
    _result: StepResult | None = field(default=None)

    def result(self) -> StepResult:
        """What came of it.

        Raises:
            InvalidInputError: fp16 overflows even at the smallest loss scale.
        """
        if self._result is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._result = self._finish(self._values.tolist())
        return self._result


class Step:
    """Binds model, objective and optimizer; call it once for each batch. The model must be in training mode.

    Args:
        clip: the model, with fp32 weights.
        objective: over all pairs of a batch, on the model's device.
        optimizer: of all that is trained, the objective's own parameters and the similarity's included.
        precision: of the towers.
        clip_norm: to which longer gradients are shortened; 0: they are not.
        micro_batch_size: pairs that go through the towers at once; None: the batch, whatever its size.
        texts_per_image: texts that go through their tower at once for each image that does.
        batch_norms: what batch normalisation does with its statistics; None: as torch does it.
        teacher: for objectives that need the starting model.
        half_weights: what stands in for weights in batches that are divided; None: nothing does.
        compilation: of the towers. Where the compiler fails it is off from then on, and the step in which it
            did is computed again from its beginning, uncompiled. None: they are not compiled.

    Attributes:
        micro_batch_size: may be changed between steps, and after a `StepOutOfMemoryError`.
    """

    def __init__(
        self,
        clip: Clip,
        objective: Objective,
        optimizer: AdamW,
        precision: Precision,
        *,
        clip_norm: float,
        micro_batch_size: int | None = None,
        texts_per_image: int = 1,
        batch_norms: BatchNorms | None = None,
        teacher: StartingModel | None = None,
        half_weights: HalfWeights | None = None,
        compilation: Compilation | None = None,
    ) -> None:
        self._clip, self._objective, self._optimizer, self._precision = clip, objective, optimizer, precision
        self._teacher, self._half_weights, self._compilation = teacher, half_weights, compilation
        self._max_norm = clip_norm or math.inf
        self._texts_per_image = texts_per_image
        self._batch_norms = batch_norms or BatchNorms(clip.model)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._device = clip.device
        self._skips_on_device = _skips_on_device(optimizer, self._device)
        self.micro_batch_size = micro_batch_size

    def __call__(self, batch: Batch, learning_rate: float) -> StepResult:
        """Trains on one batch and waits for the outcome.

        Raises:
            StepOutOfMemoryError: the device's memory does not hold the micro-batch; nothing has changed.
            InvalidInputError: fp16 overflows even at the smallest loss scale.
        """
        return self.launch(batch, learning_rate).result()

    def launch(self, batch: Batch, learning_rate: float) -> StepInFlight:
        """Trains on one batch without waiting for the device.

        The outcome should be read before a checkpoint is written and before the step after the next. Where
        it was bad, its cause is looked for with the weights as they are when it is read.

        Raises:
            StepOutOfMemoryError: the device's memory does not hold the micro-batch; nothing has changed.
        """
        set_learning_rate(self._optimizer, learning_rate)
        self._batch_norms.prepare()
        random, statistics = RandomState.capture(self._device), self._batch_norms.capture()
        size = self.micro_batch_size or len(batch.tokens_BL)
        loss = self._sure_gradients(batch, size, random, statistics)
        scaler = self._precision.scaler
        scale = None if scaler is None else scaler.scale
        with torch.no_grad():
            norm, bad = self._judge(loss, scale)
            self._update(norm, bad, scale)
            self._objective.constrain(self._clip)
            self._batch_norms.restore(statistics, where=bad)
            if scaler is not None:
                scaler.update(bad)
            values = torch.stack(
                [
                    loss.float(),
                    norm.float(),
                    self._logit_scale().float(),
                    bad.float(),
                    torch.zeros_like(norm, dtype=torch.float32) if scale is None else scale,
                ]
            )
        self._optimizer.zero_grad(set_to_none=True)

        def finish(values: list[float]) -> StepResult:
            return self._result(values, lambda: self._find_culprit(batch, size, random))

        return StepInFlight(*_to_host(values), finish)

    def _sure_gradients(
        self, batch: Batch, size: int, random: RandomState, statistics: list[Tensor]
    ) -> Tensor:
        """The gradients and the loss, computed in one way from beginning to end; or no trace of them."""
        while True:
            compilation = self._compilation if self._compilation and self._compilation.on else None
            out_of_memory = None
            try:
                loss = self._gradients(batch, size)
                if compilation is None or compilation.on:
                    return loss
                compilation.stop(compilation.choice.reason)  # some blocks were compiled, and others were not
            except Exception as error:
                if is_out_of_memory(error):
                    out_of_memory = str(error)
                elif compilation is None or not compilation.gives_up(error):
                    raise
            # Outside the handler: the error's traceback holds the tensors that filled the memory.
            self._optimizer.zero_grad(set_to_none=True)
            random.restore()
            self._batch_norms.restore(statistics)
            release_memory(self._device)
            if out_of_memory is not None:
                raise StepOutOfMemoryError(size, out_of_memory)

    def _gradients(self, batch: Batch, size: int) -> Tensor:
        self._allocate_optimizer_state()
        return accumulate(
            self._clip,
            self._objective,
            self._precision,
            batch,
            size,
            texts_per_image=self._texts_per_image,
            batch_norms=self._batch_norms,
            teacher=self._teacher,
            half_weights=self._half_weights,
        )

    def _allocate_optimizer_state(self) -> None:
        """Adam makes its moments at its first step: too late, since memory that is missing there leaves some
        weights updated and others not. A step that is left out makes them and changes nothing."""
        missing = [parameter for parameter in self._parameters if parameter not in self._optimizer.state]
        if not missing or not self._skips_on_device:
            return
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        self._fused_update(None, torch.ones((), device=self._device))
        self._optimizer.zero_grad(set_to_none=True)

    def _judge(self, loss: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Norm of the gradient, without loss scale, and whether to leave the step out; both on the device."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if scale is not None:
            norm = norm / scale
        return norm, ~(torch.isfinite(norm) & torch.isfinite(loss))

    def _update(self, norm: Tensor, bad: Tensor, scale: Tensor | None) -> None:
        """Clips, removes the loss scale and updates, in the optimizer's one pass over the gradients."""
        divisor = scale
        if math.isfinite(self._max_norm):
            # Gradients are divided by it, so 1 leaves them as they are, bit by bit.
            excess = ((norm + _NORM_EPS) / self._max_norm).clamp(min=1.0).float()
            divisor = excess if scale is None else excess * scale
        if self._skips_on_device:
            self._fused_update(divisor, bad.float())
        elif not bool(bad):
            if divisor is not None:
                for parameter in self._parameters:
                    if parameter.grad is not None:
                        parameter.grad.div_(divisor)
            self._optimizer.step()

    def _fused_update(self, divisor: Tensor | None, left_out: Tensor) -> None:
        """As torch.amp.GradScaler hands them over: fused optimizers look for these two attributes."""
        optimizer = cast("_ScaledOptimizer", self._optimizer)
        optimizer.grad_scale, optimizer.found_inf = divisor, left_out
        try:
            self._optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def _logit_scale(self) -> Tensor:
        return cast(Tensor, self._clip.model.logit_scale).detach().exp().reshape(())

    def _result(self, values: list[float], find_culprit: Callable[[], Culprit | None]) -> StepResult:
        loss, norm, logit_scale, bad, loss_scale = values
        culprit = None
        if bad:
            overflows = loss_scale > 0 and math.isfinite(loss)
            at_floor = overflows and loss_scale <= LossScaler.FLOOR
            if not overflows or at_floor:
                culprit = find_culprit()
            if at_floor:
                raise InvalidInputError(
                    f"fp16 cannot hold the gradients even at a loss scale of {LossScaler.FLOOR:g}"
                    f"{f' ({culprit})' if culprit else ''}: use train.precision = 'bf16' or 'fp32', or lower"
                    " train.learning_rate"
                )
        return StepResult(
            loss=loss,
            gradient_norm=norm,
            logit_scale=logit_scale,
            skipped=bool(bad),
            loss_scale=loss_scale,
            culprit=culprit,
        )

    def _find_culprit(self, batch: Batch, size: int, random: RandomState) -> Culprit | None:
        """Repeats the step's gradients under the guard, with the random masks of then; changes nothing."""
        statistics = self._batch_norms.capture()
        guard = NanGuard(self._clip.model)
        try:
            with random.replayed(), guard.watching():
                self._gradients(batch, size)
            return guard.culprit
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None  # others have taken the memory since; the step is told as skipped all the same
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            self._batch_norms.restore(statistics)


class _ScaledOptimizer(AdamW):
    """For the type checker: the attributes that torch sets and removes around a fused step."""

    grad_scale: Tensor | None
    found_inf: Tensor


def release_memory(device: torch.device) -> None:
    """Gives what is no longer used back to the device, after memory ran out."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _skips_on_device(optimizer: AdamW, device: torch.device) -> bool:
    """Whether the optimizer is fused and obeys `found_inf` (MPS: from torch 2.13)."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return device.type != "mps" or version >= (2, 13)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Starts the copy on CUDA, so that reading it later waits for this step alone."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied
