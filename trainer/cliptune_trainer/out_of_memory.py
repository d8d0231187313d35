"""Whether an error means that memory ran out.

Enters: an exception of a training step. Leaves: yes or no. Called by the step, the probe and the loop.
Only CUDA has a class for it; elsewhere the message tells.
"""

from __future__ import annotations

from typing import Final

import torch

# Anywhere in the message: CPU's comes after "[enforce fail at ...]", a compiled graph's after its own words.
_MESSAGES: Final = (
    "MPS backend out of memory",
    "Invalid buffer size",  # MPS: one tensor larger than Metal's largest buffer
    "kIOGPUCommandBufferCallbackErrorOutOfMemory",  # MPS: Metal refused while computing
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",  # from a library's own allocation, not torch's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the machine had no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
