"""The sigmoid loss a tile at a time: the memory of a few tiles, not of the N x N table.

Enters: what every loss takes, and the side of a tile. Leaves: the same loss and gradients as `sigmoid`.
Called by the step through `loss_for`. One pass, since no logit needs to know another.
N: pairs in the batch, D: embedding dimension, M and K: rows and columns of a tile.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune_trainer.losses.fused import Fused
from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.sigmoid import bias_of
from cliptune_trainer.losses.tiles import Gradients, LogitTable, diagonal, differentiable


def tiled_sigmoid(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    identities: Identities,
    *,
    block: int,
    products: torch.dtype | None = None,
) -> Tensor:
    """`sigmoid` in tiles of `block` x `block`; `products` as `LogitTable` has it."""

    def evaluate(
        image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Gradients | None]:
        table = LogitTable(image_ND, text_ND, scale, block=block, products=products)
        added = bias_of(bias)
        values, biases = [], []
        for tile, logits_MK in table.tiles():
            if wanted:
                value, gradient_MK, bias_gradient = _value_and_gradient(
                    logits_MK, added, tile.own, table.factors
                )
                del logits_MK  # before the next tile is made
                table.add(tile, gradient_MK)
                del gradient_MK
                biases.append(bias_gradient)
            else:
                value = _value(logits_MK, added, tile.own)
                del logits_MK
            values.append(value)
        total = torch.stack(values).sum() / len(table)
        if not wanted:
            return total, None
        return total, table.gradients(1.0 / len(table), torch.stack(biases).sum() / len(table))

    return differentiable(evaluate, image_ND, text_ND, logit_scale, logit_bias)


def _signed(logits_MK: Tensor, bias: Tensor, own: bool) -> Tensor:
    """Logits of being wrong: those of the row's own text, on the diagonal, count the other way."""
    wrong_MK = logits_MK + bias
    return _turned(wrong_MK) if own else wrong_MK


def _turned(tile_MK: Tensor) -> Tensor:
    """With the other sign on the diagonal. May overwrite its argument."""
    if tile_MK.is_cuda:  # one pass when compiled: a diagonal would be a tensor to write first
        return torch.where(diagonal(tile_MK), -tile_MK, tile_MK)
    tile_MK.diagonal().neg_()
    return tile_MK


def _value_of(logits_MK: Tensor, bias: Tensor, own: bool) -> Tensor:
    """N times the tile's part of the loss."""
    return F.softplus(_signed(logits_MK, bias, own)).sum()


def _value_and_gradient_of(
    logits_MK: Tensor, bias: Tensor, own: bool, factors: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """N times the tile's part of the loss, its gradient by the logits, and that by the bias."""
    wrong_MK = _signed(logits_MK, bias, own)
    value = F.softplus(wrong_MK).sum()
    gradient_MK = wrong_MK.sigmoid()
    if own:
        gradient_MK = _turned(gradient_MK)
    return value, gradient_MK.to(factors), gradient_MK.sum()


_value: Final = Fused(_value_of)
_value_and_gradient: Final = Fused(_value_and_gradient_of)
