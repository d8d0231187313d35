"""How a batch's tensors reach the device while the step before still runs.

Enters: tensors in the CPU's memory. Leaves: the same, on their way to the device or left where they are.
Called by the loader: `begin` in its own thread, `arrive` in the one that steps. On CUDA the memory is pinned
and the copy runs on a stream of its own, so that neither the host nor the step waits for it. MPS has neither:
there, and on the CPU, tensors stay in the CPU's memory until the step asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

# A batch whose images are larger stays in the CPU's memory and is copied a micro-batch at a time: of a batch
# of 32,768 the device should hold no more than it works on.
_MAX_RESIDENT_BYTES: Final = 256 << 20
# Pinned memory cannot be swapped out, and torch rounds it up to a power of two.
_MAX_PINNED_BYTES: Final = 1 << 30


class Transfer:
    """Tensors on their way. `arrive` gives them to the step."""

    def __init__(self, tensors: Sequence[Tensor], copied: torch.cuda.Event | None = None) -> None:
        self._tensors, self._copied = tuple(tensors), copied

    def arrive(self) -> tuple[Tensor, ...]:
        """The tensors, for use on the current stream; never waits on the host."""
        if self._copied is not None:
            for tensor in self._tensors:
                if tensor.is_cuda:
                    stream = torch.cuda.current_stream(tensor.device)
                    stream.wait_event(self._copied)
                    # They were allocated on the copying stream: their memory is free again after this one.
                    tensor.record_stream(stream)
        return self._tensors


class Carrier:
    """Brings batches to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the CPU that can be copied from without waiting, where there is such."""
        size_bytes = math.prod(shape) * dtype.itemsize
        pinned = self._stream is not None and size_bytes <= _MAX_PINNED_BYTES
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)

    def begin(self, tensors: Sequence[Tensor]) -> Transfer:
        """Starts the copy of those that the device should hold whole."""
        if self._stream is None:
            return Transfer(tensors)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            there = [
                tensor.pin_memory().to(self.device, non_blocking=True)
                if tensor.nbytes <= _MAX_RESIDENT_BYTES
                else tensor
                for tensor in tensors
            ]
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return Transfer(there, copied)
