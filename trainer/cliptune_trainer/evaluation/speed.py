"""How fast an image tower is at a size, and what it takes.

Enters: a `Clip` at the size. Leaves: `Speed`. Called by the sweep. Only the tower is timed: images are
decoded elsewhere, and that takes as long whatever the size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

from cliptune_model.clip import Clip
from cliptune_model.machine.synchronize import synchronize
from cliptune_trainer.memory.count import LiveBytes

# On a CPU larger batches are no faster, and each takes long.
_MOST_AT_ONCE_ON_CPU: Final = 16
_REPEATS: Final = 5
_ENOUGH_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of the image tower at one size. `memory_bytes`: weights of both towers, and a batch's tensors."""

    images_per_second: float
    batch_size: int
    latency_ms: float
    memory_bytes: int


@torch.no_grad()
def measure_speed(clip: Clip, batch_size: int) -> Speed:
    """Times batches of `batch_size`, or of fewer on a CPU, and single images; in evaluation mode."""
    count = min(batch_size, _MOST_AT_ONCE_ON_CPU) if clip.device.type == "cpu" else batch_size
    memory_bytes = _memory_bytes(clip, count)
    return Speed(
        images_per_second=count / _seconds(clip, count),
        batch_size=count,
        latency_ms=1e3 * _seconds(clip, 1),
        memory_bytes=memory_bytes,
    )


def _seconds(clip: Clip, count: int) -> float:
    """The median of a few passes, after one that makes ready."""
    device = str(clip.device)
    images_B3HW = torch.zeros(count, 3, *clip.image_size, device=clip.device)
    taken: list[float] = []
    for turn in range(_REPEATS + 1):
        synchronize(device)
        began_s = time.perf_counter()
        clip.encode_images(images_B3HW)
        synchronize(device)
        if turn:
            taken.append(time.perf_counter() - began_s)
        if sum(taken) > _ENOUGH_S:
            break
    return median(taken)


def _memory_bytes(clip: Clip, count: int) -> int:
    images_B3HW = torch.zeros(count, 3, *clip.image_size, device=clip.device)
    with LiveBytes(clip.device.type) as live:
        for tensor in (*clip.model.parameters(), *clip.model.buffers(), images_B3HW):
            live.adopt(tensor)
        clip.encode_images(images_B3HW)
    peak_bytes: int = live.peak
    return peak_bytes
