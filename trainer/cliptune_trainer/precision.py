"""In which number format the towers compute.

Enters: "fp32", "bf16" or "fp16" and a device. Leaves: an autocast context and, for fp16, a gradient scaler.
Called by the step. Weights stay fp32 always; features, loss and optimizer are fp32 too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch.amp.grad_scaler import GradScaler

_HALF: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """`name` on a device type ("cpu", "cuda", "mps"). `scaler` is None unless `name` is "fp16"."""

    def __init__(self, name: str, device_type: str) -> None:
        self.name = name
        self._device_type = device_type
        self.scaler = GradScaler(device_type) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, matrix products run in the half format."""
        if self.name not in _HALF:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=_HALF[self.name])
