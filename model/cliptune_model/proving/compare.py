"""How far a device's numbers are from the CPU's, and memory that has seen use.

Enters: tensors of both. Leaves: relative differences, judged into a `Proof`. Called by the other files here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from cliptune_model.machine.proofs import Proof
from cliptune_model.machine.synchronize import synchronize

# Right fp32 arithmetic stays below 1e-4; wrong gradients are far above 1e-2.
FP32_LIMIT: Final = 1e-3
# Gradients of one parameter in half precision, measured: up to 0.05. One that was zeroed differs by 1.
HALF_LIMIT: Final = 0.25

# Odd sizes, so that what follows starts at odd places of the allocator's heaps.
_CHURNED: Final = (3, 1_001, 65_537, 1_000_003, 17, 262_145, 4_099)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """At which sizes a device is tried. The defaults are those of ViT-B/16 with CLIP's text tower."""

    pairs: int = 8
    image_px: int = 224
    patch_px: int = 16
    image_width: int = 768
    image_heads: int = 12
    text_tokens: int = 77
    text_width: int = 512
    text_heads: int = 8
    embedding_dim: int = 512
    batch_pairs: int = 512  # of the loss
    long_rows: int = 40_000  # beyond 32,767
    block_bytes: int = 2**20  # of attention, so small that there are several blocks

    @property
    def image_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_px // self.patch_px) ** 2 + 1


# The CPU is what other devices are compared with: there a small try is enough.
SMALL: Final = Sizes(
    pairs=2,
    image_px=64,
    image_width=64,
    image_heads=4,
    text_tokens=16,
    text_width=32,
    text_heads=2,
    embedding_dim=32,
    batch_pairs=32,
    block_bytes=2**10,
)


def sizes_for(device: str) -> Sizes:
    """Real ones on an accelerator."""
    return SMALL if torch.device(device).type == "cpu" else Sizes()


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; NaN where `found` is not finite."""
    exact = exact.detach().cpu().double()
    found = found.detach().cpu().double()
    if not bool(torch.isfinite(found).all()):
        return math.nan
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def worst(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The largest relative difference, among tensors whose size is worth the name; NaN if one is NaN."""
    largest = max(float(tensor.norm()) for tensor in exact.values())
    differences = [
        relative(found[name], tensor)
        for name, tensor in exact.items()
        if float(tensor.norm()) >= 1e-6 * largest
    ]
    return math.nan if any(math.isnan(difference) for difference in differences) else max(differences)


def judged(difference: float, limit: float, what: str) -> Proof:
    """The proof that `what` differs by no more than `limit`."""
    return Proof(holds=difference <= limit, told=f"{what}: relative difference {difference:.1e}")


@contextmanager
def churned(device: str) -> Iterator[None]:
    """Inside, the device's allocator hands out used memory: freed blocks full of NaN between living ones."""
    living = []
    for turn in range(3):
        for size in _CHURNED:
            dirty = [torch.full((size + turn,), math.nan, device=device) for _ in range(4)]
            living.append(dirty[1])
            del dirty
    synchronize(device)
    yield
    del living


@contextmanager
def true_fp32() -> Iterator[None]:
    """CUDA rounds fp32 to TF32 in convolutions by default: not wrong, but too coarse for a comparison."""
    backends = (cast(Any, torch.backends.cudnn).conv, cast(Any, torch.backends.cuda).matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
