"""A running mean of the weights (EMA): steadier than the last ones.

Enters: the model after each step. Leaves: the mean, and its place in a checkpoint. Called by `guard`. It is
kept in fp32 on the model's device, where it takes the memory of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_trainer.guard.start import changing


class RunningMean:
    """The mean of what training changes. Begins as the model is now.

    Args:
        clip: the model.
        decay: share of the mean that a step leaves. Early steps leave less, (1 + t) / (10 + t), so that a
            short run's mean is not its beginning (Tan and Le 2019's training code, and TensorFlow's
            ExponentialMovingAverage).
    """

    def __init__(self, clip: Clip, decay: float) -> None:
        self._decay = decay
        self._weights = list(changing(clip).values())
        self._mean = {name: tensor.clone() for name, tensor in changing(clip).items()}

    @torch.no_grad()
    def step_done(self, step: int) -> None:
        """Takes the weights of after a step in, counted from 1; waits for no device."""
        leaves = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._mean.values()), self._weights, 1 - leaves)

    def weights(self) -> dict[str, Tensor]:
        """The mean, by name."""
        return dict(self._mean)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, on the CPU."""
        return {name: tensor.cpu().contiguous() for name, tensor in self._mean.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, mean in self._mean.items():
            mean.copy_(tensors[name])
