"""One optimisation step: batch → towers → loss → gradients → weights.

Enters: a `Batch` and a learning rate. Leaves: a `StepResult`. Called by the loop.
B: pairs in the batch, D: embedding dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from cliptune.errors import OverloadedError
from cliptune_model.clip import Clip
from cliptune_trainer.data.loader import Batch
from cliptune_trainer.losses import Identities, Loss
from cliptune_trainer.optim import clamp_logit_scale
from cliptune_trainer.precision import Precision

_OUT_OF_MEMORY: Final = (
    "MPS backend out of memory",
    "Invalid buffer size",
    "DefaultCPUAllocator: can't allocate memory",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What came of a step. `skipped`: loss or gradient was not finite and no weight was changed."""

    loss: float
    gradient_norm: float  # before clipping
    logit_scale: float  # exp of the parameter, after the step
    skipped: bool


class Step:
    """Binds model, loss and optimizer; call it once for each batch. The model must be in training mode."""

    def __init__(
        self, clip: Clip, loss: Loss, optimizer: AdamW, precision: Precision, *, clip_norm: float
    ) -> None:
        self._clip, self._loss, self._optimizer, self._precision = clip, loss, optimizer, precision
        self._max_norm = clip_norm or math.inf
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def __call__(self, batch: Batch, learning_rate: float) -> StepResult:
        """Trains on one batch.

        Raises:
            OverloadedError: the device's memory does not hold the batch.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        try:
            return self._step(batch)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or str(error).startswith(_OUT_OF_MEMORY):
                raise OverloadedError(
                    f"a step with train.batch_size = {len(batch.tokens_BL)} does not fit in the memory of "
                    f"{self._clip.device}: lower it, or choose a smaller model ({error})"
                ) from error
            raise

    def _step(self, batch: Batch) -> StepResult:
        loss = contrastive_loss(self._clip, self._loss, self._precision, batch)
        scaler = self._precision.scaler
        loss_value = float(loss.detach())
        if not math.isfinite(loss_value):
            return self._result(loss_value, math.nan, skipped=True)
        if scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(self._optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm))
        finite = math.isfinite(norm)
        if scaler is not None:
            # Skips by itself what overflowed, and lowers its scale.
            scaler.step(self._optimizer)
            scaler.update()
        elif finite:
            self._optimizer.step()
        clamp_logit_scale(self._clip.model)
        self._optimizer.zero_grad(set_to_none=True)
        return self._result(loss_value, norm, skipped=not finite)

    def _result(self, loss: float, norm: float, *, skipped: bool) -> StepResult:
        return StepResult(loss=loss, gradient_norm=norm, logit_scale=self._clip.logit_scale, skipped=skipped)


def contrastive_loss(clip: Clip, loss: Loss, precision: Precision, batch: Batch) -> Tensor:
    """Forward through both towers and the loss; scalar, fp32, with gradients."""
    device = clip.device
    with precision.autocast():
        image_BD = clip.encode_images(batch.images_B3HW.to(device))
        text_BD = clip.encode_texts(batch.tokens_BL.to(device))
    identities = Identities(
        image_ids_N=batch.image_ids_B.to(device), caption_ids_N=batch.caption_ids_B.to(device)
    )
    # Normalised in fp32: half precision rounds unit vectors too coarsely.
    return loss(
        F.normalize(image_BD, dim=-1),
        F.normalize(text_BD, dim=-1),
        cast(Tensor, clip.model.logit_scale).exp(),
        getattr(clip.model, "logit_bias", None),
        identities,
    )
