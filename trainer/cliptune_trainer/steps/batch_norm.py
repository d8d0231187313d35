"""What batch normalisation does when a batch goes through its tower in parts.

Enters: a model. Leaves: a `BatchNorms`, which keeps its running statistics honest. Called by the step.

A convolutional tower in training normalises by the statistics of what passes at once: of a micro-batch, not
of the batch (Hoffer et al. 2017, ghost batch normalisation). No accumulation can be exact there, save with
the statistics frozen. What can be kept: every part counts once in the running statistics, however often it is
computed, and a step that comes to nothing leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cliptune_model.choice import Choice
from cliptune_trainer.steps.trainable import still_modules

FROZEN = "frozen"
PASSING = "micro-batch"
WHOLE = "batch"


def choose_batch_norm(
    model: nn.Module, *, pretrained: bool, batch_size: int, micro_batch_size: int
) -> Choice:
    """Whose statistics batch normalisation works by: of the "batch", of each "micro-batch", or "frozen" ones.

    Args:
        model: of the job.
        pretrained: its running statistics come from a training.
        batch_size: pairs of a step.
        micro_batch_size: pairs that go through the towers at once.
    """
    subject = "batch_norm"
    if not has_batch_norm(model):
        return Choice(subject=subject, value=WHOLE, reason="the towers have none; accumulation is exact")
    if micro_batch_size >= batch_size:
        return Choice(subject=subject, value=WHOLE, reason="the batch goes through the towers at once")
    if pretrained:
        return Choice(
            subject=subject,
            value=FROZEN,
            reason=f"parts of {micro_batch_size} have other statistics than the batch of {batch_size}; with"
            " the pretrained ones the gradient is exactly that of the batch",
        )
    return Choice(
        subject=subject,
        value=PASSING,
        reason=f"random weights have no statistics to rely on: each part of {micro_batch_size} is normalised"
        " by its own, so that the gradient is not exactly that of the batch",
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a part of the model mixes the rows of what passes at once."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class BatchNorms:
    """The batch normalisations of a model.

    Args:
        model: it may have none; then everything here does nothing.
        frozen: they keep and use the statistics that they have.
    """

    def __init__(self, model: nn.Module, *, frozen: bool = False) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._still = still_modules(model)
        self._frozen = frozen

    def prepare(self) -> None:
        """Before a step: `model.train()` has thawed what shall be frozen, whole towers too."""
        for part in self._still:
            part.eval()
        if self._frozen:
            for module in self._modules:
                module.eval()

    def capture(self) -> list[Tensor]:
        """Copies of the running statistics, on the device."""
        return [buffer.clone() for buffer in self._buffers()]

    @torch.no_grad()
    def restore(self, captured: list[Tensor], where: Tensor | None = None) -> None:
        """Puts the statistics back; with `where`, a bool scalar on the device, only if it is true."""
        for buffer, before in zip(self._buffers(), captured, strict=True):
            buffer.copy_(before if where is None else torch.where(where, before, buffer))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What passes inside is normalised as ever, but has not entered the running statistics afterwards."""
        before = self.capture()
        try:
            yield
        finally:
            self.restore(before)

    def _buffers(self) -> Iterator[Tensor]:
        for module in self._modules:
            yield from module.buffers(recurse=False)
