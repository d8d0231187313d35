"""Contrastive losses by name.

Enters: unit features of both towers, the logit scale and bias, and which rows share an image or a caption.
Leaves: a scalar. Called by the step. A loss is a pure function; a new one is a file here and a line in
`LOSSES`, and one in `TILED` if it can be had a tile at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from cliptune_trainer.losses.choice import TILINGS, WHOLE, choose_tiling, largest_block, loss_bytes
from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.infonce import infonce
from cliptune_trainer.losses.multi_positive import multi_positive
from cliptune_trainer.losses.sigmoid import sigmoid
from cliptune_trainer.losses.tiled_sigmoid import tiled_sigmoid
from cliptune_trainer.losses.tiled_softmax import tiled_infonce, tiled_multi_positive

__all__ = [
    "LOSSES",
    "NEED_BIAS",
    "TILED",
    "TILINGS",
    "WHOLE",
    "Identities",
    "Loss",
    "TiledLoss",
    "choose_tiling",
    "infonce",
    "largest_block",
    "loss_bytes",
    "loss_for",
    "multi_positive",
    "sigmoid",
    "tiled_infonce",
    "tiled_multi_positive",
    "tiled_sigmoid",
]


class Loss(Protocol):
    """What every loss takes and gives."""

    def __call__(
        self,
        image_ND: Tensor,
        text_ND: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        identities: Identities,
    ) -> Tensor:
        """Features of unit length, logit scale (exponentiated) and bias (if the model has one), who is who.

        Returns a scalar, fp32 (fp64 for fp64 features).
        """
        ...


class TiledLoss(Protocol):
    """A loss that never holds more than a few tiles of `block` x `block` logits."""

    def __call__(
        self,
        image_ND: Tensor,
        text_ND: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        identities: Identities,
        *,
        block: int,
        products: torch.dtype | None = None,
    ) -> Tensor:
        """As `Loss`. `products`: bf16 to multiply in bf16 on CUDA whatever the features' format is."""
        ...


LOSSES: Final[dict[str, Loss]] = {"infonce": infonce, "multi_positive": multi_positive, "sigmoid": sigmoid}
TILED: Final[dict[str, TiledLoss]] = {
    "infonce": tiled_infonce,
    "multi_positive": tiled_multi_positive,
    "sigmoid": tiled_sigmoid,
}
NEED_BIAS: Final = frozenset({"sigmoid"})
"""Losses that need a model with a logit bias."""


def loss_for(
    name: str, *, tiled: bool, block: int | None = None, products: torch.dtype | None = None
) -> Loss:
    """The loss of that name.

    Args:
        name: a key of `LOSSES`.
        tiled: take the table of logits a tile at a time; see `choose_tiling`.
        block: side of a tile; None: what suits the CPU.
        products: bf16 to multiply in bf16 on CUDA although the features are fp32; only for tiled losses.
    """
    if not tiled:
        return LOSSES[name]
    return partial(TILED[name], block=block or largest_block(name, 0, "cpu"), products=products)
