"""Whether a loss takes its N x N table whole or a tile at a time.

Enters: the loss, what the user wished, N and D, the device and the bytes that the loss may take. Leaves: a
`Choice`. Called by the batch plan.
N: pairs in the batch, D: embedding dimension.
"""

from __future__ import annotations

from typing import Final

import torch

from cliptune.errors import SpecError
from cliptune_model.choice import Choice
from cliptune_trainer.losses.catalog import LOSSES

TILINGS: Final = ("auto", "on", "off")
WHOLE: Final = "off"
"""The value of a `Choice` for the whole table; otherwise it is the side of a tile."""

# fp32 numbers a pair that a tile takes at its peak: logits, copies that are worked on, the gradient.
_TILE_COPIES: Final = {"infonce": 3, "sigmoid": 3, "multi_positive": 4}
_FP32_BYTES: Final = 4
# Up to here the whole table is no burden, and the second pass over tiles would only cost time.
_SMALL_BYTES: Final = 1 << 30
# From this many summands on, products on Apple's M1 and M2 read past their operands (pytorch#193487).
LONG_SUM: Final = 32_767
# On an accelerator a tile is large enough to keep it busy, on the CPU small enough for its cache.
_LARGEST_BLOCK: Final = {"cuda": 8192, "mps": 4096, "cpu": 2048}
_SMALLEST_BLOCK: Final = 256


def choose_tiling(
    name: str, wanted: str, n: int, dim: int, device: str, budget_bytes: int | None = None
) -> Choice:
    """Decides for one loss and batch.

    Args:
        name: of the loss.
        wanted: "auto", "on" or "off".
        n: pairs in the effective batch.
        dim: of the embedding.
        device: a torch device.
        budget_bytes: what the loss may take beside the features; None: not known to be scarce.

    Returns:
        "off", or the side of a tile as a number.

    Raises:
        SpecError: "off" is wanted where the whole table would give wrong sums.
    """
    kind = torch.device(device).type
    whole_bytes = LOSSES[name].tables * _FP32_BYTES * n * n
    block = largest_block(name, n, kind, budget_bytes)
    gib = f"{whole_bytes / 2**30:.3g} GiB"
    if kind == "mps" and n >= LONG_SUM:
        if wanted == "off":
            raise SpecError(
                f"loss.tiling is 'off', but Apple's M1 and M2 sum wrongly over {LONG_SUM} pairs or more, and"
                f" train.batch_size is {n}; allowed: auto, on",
                path="loss.tiling",
                allowed="auto, on",
            )
        reason = f"Apple's M1 and M2 sum wrongly over {LONG_SUM} pairs or more: at most {block} at a time"
        return Choice(subject="loss tiling", value=str(block), reason=reason)
    if wanted == "off":
        return Choice(subject="loss tiling", value=WHOLE, reason=f"asked for; it takes about {gib}")
    if wanted == "on":
        return Choice(subject="loss tiling", value=str(block), reason=f"asked for, in place of {gib}")
    if budget_bytes is not None and whole_bytes > budget_bytes:
        reason = f"all logits of {n} pairs take about {gib}, and {budget_bytes / 2**30:.3g} GiB are left"
        return Choice(subject="loss tiling", value=str(block), reason=reason)
    if whole_bytes > _SMALL_BYTES:
        reason = f"all logits of {n} pairs would take about {gib}"
        return Choice(subject="loss tiling", value=str(block), reason=reason)
    reason = f"all logits of {n} pairs take about {max(1, whole_bytes >> 20)} MiB"
    return Choice(subject="loss tiling", value=WHOLE, reason=reason)


def largest_block(name: str, n: int, kind: str, budget_bytes: int | None = None) -> int:
    """Side of the tiles of a loss: what suits a device's kind, or the power of two that the budget holds."""
    block = _LARGEST_BLOCK.get(kind, _LARGEST_BLOCK["cpu"])
    if budget_bytes is not None:
        while block > _SMALLEST_BLOCK and _TILE_COPIES[name] * _FP32_BYTES * block * block > budget_bytes:
            block //= 2
    return block


def loss_bytes(name: str, n: int, dim: int, tiling: Choice) -> int:
    """Bytes that a loss takes at its peak, the features themselves not counted."""
    if tiling.value == WHOLE:
        return (LOSSES[name].tables * n + 4 * dim + 16) * n * _FP32_BYTES
    block = min(int(tiling.value), n)
    # Beside tiles: features in the products' format, sums of gradients, gradients; and some vectors.
    return (_TILE_COPIES[name] * block * block + (6 * dim + 16) * n) * _FP32_BYTES
