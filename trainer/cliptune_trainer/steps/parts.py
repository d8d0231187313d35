"""A batch in parts, and a part on its way to the device.

Enters: how many rows there are and how many pass at once. Leaves: slices. Called by accumulation, by the
teacher and wherever it must be known which sizes the towers will see.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def parts_of(count: int, size: int) -> list[slice]:
    """`count` rows in as few parts of at most `size` as can be, as even as can be, in at most two lengths.

    The last part, whose graph is kept, is of the larger length.
    """
    if size < 1:
        raise ValueError(f"a micro-batch of {size} pairs")
    parts = -(-count // size)
    bounds = [part * count // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy from pinned memory runs beside the host."""
    # Elsewhere the flag would be unsafe or idle.
    return tensor.to(device, non_blocking=device.type == "cuda")
