"""The batch of all ranks, so that every rank's loss is that of the whole.

Enters: rows of this rank. Leaves: rows of all, in the order of ranks. Called by the objective where a process
group is there. Every rank has as many rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx, once_differentiable


def ranks() -> int:
    """How many processes share a batch; 1: this one is alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def gathered(rows: Tensor) -> Tensor:
    """[N, ...] of this rank → [ranks * N, ...] of all; differentiable.

    Every rank takes the whole loss, so what flows back to a rank's own rows is all that there is: nothing is
    summed over ranks here. It is multiplied by the number of ranks, because gradients of weights are averaged
    over ranks afterwards, which is right for what every rank has in full (scale, bias) and would divide the
    towers' share.
    """
    return _Gathered.apply(rows) if rows.requires_grad else _all(rows)


def _all(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(ranks())]
    distributed.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        return _all(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        count, rank = ranks(), distributed.get_rank()
        return gradient.chunk(count)[rank] * count
