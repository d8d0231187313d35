"""Contrastive losses by name, and what is made of them.

Enters: features of both towers as the similarity prepares them, scale and bias, and which rows share an
image, a caption or a label: a `Contrast`. Leaves: a scalar. Called by the objective, which the step calls. A
loss is a pure function; a new one is a file here and an entry in `LOSSES`. `config` is what a spec says of
them, `objective` what a step minimises.
"""

from __future__ import annotations

from functools import partial

import torch

from cliptune_trainer.losses.catalog import LOSSES
from cliptune_trainer.losses.choice import TILINGS, WHOLE, choose_tiling, largest_block, loss_bytes
from cliptune_trainer.losses.contrast import Contrast, Loss, Teacher
from cliptune_trainer.losses.entry import LossEntry, Parameter
from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.own import declares

__all__ = [
    "LOSSES",
    "TILINGS",
    "WHOLE",
    "Contrast",
    "Identities",
    "Loss",
    "LossEntry",
    "Parameter",
    "Teacher",
    "choose_tiling",
    "declares",
    "largest_block",
    "loss_bytes",
    "loss_for",
]


def loss_for(
    name: str,
    *,
    tiled: bool,
    block: int | None = None,
    products: torch.dtype | None = None,
    **parameters: float,
) -> Loss:
    """The loss of that name, its parameters bound.

    Args:
        name: a key of `LOSSES`.
        tiled: take the table of logits a tile at a time; see `choose_tiling`. Not every loss can be.
        block: side of a tile; None: what suits the CPU.
        products: bf16 to multiply in bf16 on CUDA although the features are fp32; only for tiled losses.
        parameters: of the loss.
    """
    entry = LOSSES[name]
    if not tiled:
        return partial(entry.function, **parameters)
    if entry.tiled is None:
        raise ValueError(f"{name} needs the whole table")
    side = block or largest_block(name, 0, "cpu")
    return partial(entry.tiled, block=side, products=products, **parameters)
