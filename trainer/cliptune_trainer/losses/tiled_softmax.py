"""InfoNCE and the multi-positive loss a tile at a time: the memory of a few tiles, not of the N x N table.

Enters: what every loss takes, and the side of a tile. Leaves: the same loss and gradients as `infonce` and
`multi_positive`. Called by the step through `loss_for`.
N: pairs in the batch, D: embedding dimension, M and K: rows and columns of a tile.

Two passes over the table (Cheng et al. 2024, Inf-CL). The first finds the log-sum-exp of every row and column
by a running maximum (Milakov and Gimelshein 2018, Algorithm 3). The second makes the tiles again and turns
each into its gradient, over 2N: exp(logit - row's) + exp(logit - column's), less 2 where image and text
belong together.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from cliptune_trainer.losses.fused import Fused
from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.tiles import Gradients, LogitTable, diagonal, differentiable

LogSum = tuple[Tensor, Tensor]
"""Maximum so far, and the sum of exponentials relative to it."""


def tiled_infonce(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    identities: Identities,
    *,
    block: int,
    products: torch.dtype | None = None,
) -> Tensor:
    """`infonce` in tiles of `block` x `block`; `products` as `LogitTable` has it."""

    def evaluate(
        image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Gradients | None]:
        table = LogitTable(image_ND, text_ND, scale, block=block, products=products)
        row_sums, column_sums = _empty(table), _empty(table)
        own_N = table.vector(0.0)
        for tile, logits_MK in table.tiles():
            _absorb(row_sums, tile.rows, column_sums, tile.columns, logits_MK)
            if tile.own:
                own_N[tile.rows] = logits_MK.diagonal()
            del logits_MK  # before the next tile is made
        rows_N, columns_N = _finished(row_sums), _finished(column_sums)
        value = 0.5 * ((rows_N - own_N).mean() + (columns_N - own_N).mean())
        if not wanted:
            return value, None
        for tile, logits_MK in table.tiles():
            gradient_MK = _gradient(
                logits_MK, rows_N[tile.rows], columns_N[tile.columns], tile.own, table.factors
            )
            del logits_MK
            table.add(tile, gradient_MK)
            del gradient_MK
        return value, table.gradients(0.5 / len(table))

    return differentiable(evaluate, image_ND, text_ND, logit_scale, logit_bias)


def tiled_multi_positive(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    identities: Identities,
    *,
    block: int,
    products: torch.dtype | None = None,
) -> Tensor:
    """`multi_positive` in tiles of `block` x `block`; `products` as `LogitTable` has it."""

    def evaluate(
        image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Gradients | None]:
        table = LogitTable(image_ND, text_ND, scale, block=block, products=products)
        row_sums, column_sums = _empty(table), _empty(table)
        # Who is whose positive is symmetric: a row's count is its column's too.
        counts_N, row_positives_N, column_positives_N = (table.vector(0.0) for _ in range(3))
        for tile, logits_MK in table.tiles():
            _absorb(row_sums, tile.rows, column_sums, tile.columns, logits_MK)
            same_MK = identities.same(tile.rows, tile.columns)
            counts_M, row_positives_M, column_positives_K = _positives(logits_MK, same_MK)
            counts_N[tile.rows] += counts_M
            row_positives_N[tile.rows] += row_positives_M
            column_positives_N[tile.columns] += column_positives_K
            del logits_MK, same_MK
        rows_N, columns_N = _finished(row_sums), _finished(column_sums)
        value = 0.5 * (
            (rows_N - row_positives_N / counts_N).mean() + (columns_N - column_positives_N / counts_N).mean()
        )
        if not wanted:
            return value, None
        shares_N = 1.0 / counts_N
        for tile, logits_MK in table.tiles():
            gradient_MK = _shared_gradient(
                logits_MK,
                rows_N[tile.rows],
                columns_N[tile.columns],
                identities.same(tile.rows, tile.columns),
                shares_N[tile.rows],
                shares_N[tile.columns],
                table.factors,
            )
            del logits_MK
            table.add(tile, gradient_MK)
            del gradient_MK
        return value, table.gradients(0.5 / len(table))

    return differentiable(evaluate, image_ND, text_ND, logit_scale, logit_bias)


def _empty(table: LogitTable) -> LogSum:
    return table.vector(-math.inf), table.vector(0.0)


def _finished(log_sum: LogSum) -> Tensor:
    maximum_N, sum_N = log_sum
    return maximum_N + sum_N.log()


def _absorb(row_sums: LogSum, rows: slice, column_sums: LogSum, columns: slice, logits_MK: Tensor) -> None:
    of_rows, of_columns = _maxima_and_sums(logits_MK)
    for log_sum, span, (new_maximum, new_sum) in (
        (row_sums, rows, of_rows),
        (column_sums, columns, of_columns),
    ):
        maximum, total = log_sum[0][span], log_sum[1][span]
        higher = torch.maximum(maximum, new_maximum)
        total.mul_((maximum - higher).exp_()).add_(new_sum.mul_((new_maximum - higher).exp_()))
        maximum.copy_(higher)


def _sums_of(logits_MK: Tensor) -> tuple[LogSum, LogSum]:
    """Of rows and of columns."""
    row_M, column_K = logits_MK.amax(dim=1), logits_MK.amax(dim=0)
    row_sum_M = (logits_MK - row_M[:, None]).exp_().sum(dim=1)
    column_sum_K = (logits_MK - column_K[None, :]).exp_().sum(dim=0)
    return (row_M, row_sum_M), (column_K, column_sum_K)


def _gradient_of(
    logits_MK: Tensor, rows_M: Tensor, columns_K: Tensor, own: bool, factors: torch.dtype
) -> Tensor:
    """2N times the loss's gradient, rounded only at the end: near the optimum it is a small difference."""
    gradient_MK = (logits_MK - rows_M[:, None]).exp_()
    gradient_MK.add_((logits_MK - columns_K[None, :]).exp_())
    if own and gradient_MK.is_cuda:  # one pass when compiled: a diagonal would be a tensor to write first
        gradient_MK = torch.where(diagonal(gradient_MK), gradient_MK - 2.0, gradient_MK)
    elif own:
        gradient_MK.diagonal().sub_(2.0)
    return gradient_MK.to(factors)


def _shared_gradient_of(
    logits_MK: Tensor,
    rows_M: Tensor,
    columns_K: Tensor,
    same_MK: Tensor,
    shares_M: Tensor,
    shares_K: Tensor,
    factors: torch.dtype,
) -> Tensor:
    """As `_gradient_of`; a row's, and a column's, target is shared evenly by its positives."""
    gradient_MK = (logits_MK - rows_M[:, None]).exp_()
    gradient_MK.add_((logits_MK - columns_K[None, :]).exp_())
    gradient_MK.sub_(same_MK * (shares_M[:, None] + shares_K[None, :]))
    return gradient_MK.to(factors)


def _positives_of(logits_MK: Tensor, same_MK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positives of each row, and the sums of their logits along rows and columns."""
    logits_MK = logits_MK * same_MK
    counts_M = same_MK.sum(dim=1, dtype=logits_MK.dtype)
    return counts_M, logits_MK.sum(dim=1), logits_MK.sum(dim=0)


_maxima_and_sums: Final = Fused(_sums_of)
_gradient: Final = Fused(_gradient_of)
_shared_gradient: Final = Fused(_shared_gradient_of)
_positives: Final = Fused(_positives_of)
