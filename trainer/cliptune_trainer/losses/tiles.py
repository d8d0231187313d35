"""The N x N table of logits, one tile at a time, so that it never exists as a whole.

Enters: both towers' features and the logit scale. Leaves: tiles of logits, and the features' gradients summed
from the tiles' gradients. Called by the tiled losses.
N: pairs in the batch, D: embedding dimension, M and K: rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cliptune_model.similarity import widened

# A side of the last tile is rounded up to this, for the alignment that matrix units want.
_ALIGNMENT: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Rows (images) and columns (texts) of the table."""

    rows: slice
    columns: slice

    @property
    def own(self) -> bool:
        """Whether its rows' own texts are its columns, and so on its diagonal: both are cut alike."""
        return self.rows == self.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """Of the loss, in the order of a loss's arguments; `bias` is None where the loss does not look at it."""

    image_ND: Tensor
    text_ND: Tensor
    scale: Tensor
    bias: Tensor | None = None


class LogitTable:
    """Logits scale * image @ text.T of all pairs, made a tile at a time; sums gradients the same way.

    The scale is multiplied into the image features, N x D numbers instead of N x N. On CUDA products are
    taken in bf16 if the features, or `products`, are bf16: their sums, and all else, stay fp32. Elsewhere
    half precision would round the logits themselves, so products are fp32 there.
    """

    def __init__(
        self, image_ND: Tensor, text_ND: Tensor, scale: Tensor, *, block: int, products: torch.dtype | None
    ) -> None:
        self.image_ND = widened(image_ND)
        self.scale = widened(scale)
        self.dtype = self.image_ND.dtype
        self._half = image_ND.device.type == "cuda" and torch.bfloat16 in (image_ND.dtype, products)
        #: the number format of factors: features, and gradients of logits
        self.factors: torch.dtype = torch.bfloat16 if self._half else self.dtype
        self._scaled_ND = (self.image_ND * self.scale).to(self.factors)
        self._text_ND = text_ND.to(self.factors)
        self._block = block
        self._image_gradient_ND: Tensor | None = None
        self._text_gradient_ND: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_ND)

    def vector(self, value: float) -> Tensor:
        """[N], filled."""
        return self.image_ND.new_full((len(self),), value)

    def tiles(self) -> Iterator[tuple[Tile, Tensor]]:
        """Every tile with its logits [M, K], a tensor of its own that may be overwritten."""
        cuts = spans(len(self), self._block)
        for rows, columns in product(cuts, cuts):
            # Given away unnamed, so that whoever drops it frees it before the next one is made.
            yield (
                Tile(rows=rows, columns=columns),
                self._product(self._scaled_ND[rows], self._text_ND[columns].T),
            )

    def add(self, tile: Tile, gradient_MK: Tensor) -> None:
        """Adds what a tile's gradient, in `factors`, gives the features. The sum over N stays within a tile:
        on Apple's M1 and M2 longer ones read past their operands (pytorch#193487).
        """
        if self._image_gradient_ND is None or self._text_gradient_ND is None:
            self._image_gradient_ND = torch.zeros_like(self.image_ND)
            self._text_gradient_ND = torch.zeros_like(self.image_ND)
        for sums_MD, one, other in (
            (self._image_gradient_ND[tile.rows], gradient_MK, self._text_ND[tile.columns]),
            (self._text_gradient_ND[tile.columns], gradient_MK.T, self._scaled_ND[tile.rows]),
        ):
            if self._half:
                sums_MD.add_(self._product(one, other))
            else:
                sums_MD.addmm_(one, other)

    def gradients(self, factor: float, bias: Tensor | None = None) -> Gradients:
        """Of `factor` times the loss whose tiles' gradients were added. Call it once, at the end."""
        image_ND, text_ND = self._image_gradient_ND, self._text_gradient_ND
        assert image_ND is not None
        assert text_ND is not None
        image_ND.mul_(factor)
        text_ND.mul_(factor)
        # Logits are linear in the scale as in the images: the sum over the table of gradient * similarity is
        # the one over the images of gradient * feature, N * D terms instead of N * N.
        scale = torch.linalg.vecdot(self.image_ND, image_ND).sum()
        return Gradients(image_ND=image_ND.mul_(self.scale), text_ND=text_ND, scale=scale, bias=bias)

    def _product(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.mm(one, other, out_dtype=torch.float32) if self._half else one @ other


def spans(count: int, block: int) -> list[slice]:
    """0 to `count` in as few spans of at most `block` as it takes, all of one size but the last."""
    size = -(-count // -(-count // block))
    if size > _ALIGNMENT:
        size = min(block, -(-size // _ALIGNMENT) * _ALIGNMENT)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def diagonal(tile_MK: Tensor) -> Tensor:
    """[M, K] bool: where a row meets its own text in a tile cut alike both ways."""
    rows_M, columns_K = (torch.arange(side, device=tile_MK.device) for side in tile_MK.shape)
    return rows_M[:, None] == columns_K[None, :]


Evaluate = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Gradients | None]]
"""Features, scale, bias, whether gradients are wanted → the loss and its gradients."""


def differentiable(
    evaluate: Evaluate, image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The loss of `evaluate` as a node of autograd's graph."""
    inputs = [one for one in (image_ND, text_ND, scale, bias) if one is not None]
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    return cast(Tensor, _Evaluated.apply(evaluate, wanted, image_ND, text_ND, scale, bias))


class _Evaluated(torch.autograd.Function):
    """Takes the gradients while the loss is computed, when tiles are at hand, and keeps those alone.

    They are as large as the features. A backward pass of its own would make every tile again, and would hold
    these same tensors at its end.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        evaluate: Evaluate,
        wanted: bool,
        image_ND: Tensor,
        text_ND: Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """See `differentiable`."""
        with torch.autocast(image_ND.device.type, enabled=False):
            value, gradients = evaluate(image_ND, text_ND, scale, bias, wanted)
        if gradients is not None:
            bias_gradient = gradients.bias
            ctx.save_for_backward(
                gradients.image_ND.to(image_ND.dtype),
                gradients.text_ND.to(text_ND.dtype),
                gradients.scale.to(scale.dtype).view(scale.shape),
                None if bias is None or bias_gradient is None else bias_gradient.to(bias.dtype),  # type: ignore[arg-type]
            )
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Each gradient times that of the loss."""
        kept = ctx.saved_tensors
        return (
            None,
            None,
            *(
                None if one is None or not needed else one * upstream.to(one.dtype)
                for one, needed in zip(kept, ctx.needs_input_grad[2:], strict=True)
            ),
        )
