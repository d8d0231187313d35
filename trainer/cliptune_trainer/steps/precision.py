"""In which number format the towers compute, and how the loss is scaled where that format is narrow.

Enters: "fp32", "bf16" or "fp16" and a device. Leaves: autocast contexts and, for fp16, a `LossScaler`.
Called by the step. Weights stay fp32 always; features, loss and optimizer are fp32 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

_HALF: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LossScaler:
    """Keeps fp16 gradients within the format: grows while all goes well, halves at each overflow.

    Micikevicius et al. 2018, section 3.2, with torch.amp.GradScaler's numbers and form of state, so that
    either's state loads into the other. Unlike it, this one has a floor, never reads from the device, and
    leaves the division of the gradients to the fused optimizer: no pass over the gradients of its own.
    """

    INITIAL: Final = 65536.0
    GROWTH: Final = 2.0
    BACKOFF: Final = 0.5
    GROWTH_INTERVAL: Final = 2000  # steps without overflow before the scale grows
    FLOOR: Final = 1.0  # below it the gradients are made smaller, not larger: nothing is gained

    def __init__(self, device: torch.device | str) -> None:
        self._scale = torch.tensor(self.INITIAL, dtype=torch.float32, device=device)
        self._good_steps = torch.tensor(0, dtype=torch.int32, device=device)

    @property
    def scale(self) -> Tensor:
        """What the loss is multiplied by: a scalar on the device. It is replaced, never altered."""
        return self._scale

    def update(self, overflowed: Tensor) -> None:
        """Tells of a step's end.

        Args:
            overflowed: bool scalar on the device; true when a gradient was no finite number.
        """
        good_steps = self._good_steps + 1
        grows = good_steps >= self.GROWTH_INTERVAL
        grown = torch.where(grows, self._scale * self.GROWTH, self._scale)
        lowered = (self._scale * self.BACKOFF).clamp(min=self.FLOOR)
        self._scale = torch.where(overflowed, lowered, grown)
        self._good_steps = torch.where(overflowed | grows, 0, good_steps)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. Waits for the device."""
        return {
            "scale": float(self._scale),
            "growth_factor": self.GROWTH,
            "backoff_factor": self.BACKOFF,
            "growth_interval": self.GROWTH_INTERVAL,
            "_growth_tracker": int(self._good_steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; raises KeyError for what is no such state."""
        self._scale = torch.full_like(self._scale, float(state["scale"]))
        self._good_steps = torch.full_like(self._good_steps, int(state["_growth_tracker"]))


class Precision:
    """`name` on a device ("cpu", "cuda:0", "mps"). `scaler` is None unless `name` is "fp16"."""

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.name = name
        self._device_type = torch.device(device).type
        self.scaler = LossScaler(device) if name == "fp16" else None

    @property
    def half(self) -> torch.dtype | None:
        """The format of matrix products; None: fp32."""
        return _HALF.get(self.name)

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, matrix products run in the half format. Weights are cast once a context."""
        if self.half is None:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=self.half)

    def exact(self) -> AbstractContextManager[object]:
        """Inside, also within `autocast`, everything runs in the format that it comes in."""
        if self.half is None:
            return nullcontext()
        return torch.autocast(self._device_type, enabled=False)
