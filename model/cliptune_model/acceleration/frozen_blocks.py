"""The modules of a frozen tower: products with a weight that is kept in the form that a kernel reads.

Put in by `frozen.py`, for inference alone. Names and weights stay as they are; what is computed is the same
to rounding (packed), or bit by bit what autocast computes (cast).

Shape suffixes: B batch, L tokens, W width, I inputs and O outputs of a product, K values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune_model.towers.lean_blocks import LeanAttention, PatchProjection

QUICK_GELU_SCALE: Final = 1.702
# Rows of a product that the packed form is made for. MKL's packed matrices serve any number of rows (its
# reference asks for one layout, not for one size); made for 400 they were quickest from 16 to 1600.
_USUAL_ROWS: Final = 400

Product = Callable[[Tensor], Tensor]
Freeze = Callable[[Tensor, Tensor | None], Product]


class PackedProduct:
    """`x @ weight.T + bias` in fp32 by MKL, from a weight packed once instead of in each call."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        weight_OI = weight_OI.detach().contiguous()
        self._bias_O: Final = None if bias_O is None else bias_O.detach().contiguous()
        self._packed: Final = torch.ops.mkl._mkl_reorder_linear_weight(weight_OI, _USUAL_ROWS)
        # The kernel takes sizes alone from the weight itself, where the rows are those that it is told.
        self._sizes_OI: Final = weight_OI.new_empty(1).expand(weight_OI.shape)
        self._kernel: Final = torch.ops.mkl._mkl_linear.default
        self.bytes: Final = weight_OI.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        rows = x.numel() // x.shape[-1]
        found: Tensor = self._kernel(x, self._packed, self._sizes_OI, self._bias_O, rows)
        return found


class CastProduct:
    """`x @ weight.T + bias` in a lower precision, from a weight cast once: autocast casts it in each call,
    and remembers it only for weights that learn."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        self._weight_OI: Final = weight_OI.detach().to(dtype)
        self._bias_O: Final = None if bias_O is None else bias_O.detach().to(dtype)
        self._dtype: Final = dtype
        self.bytes: Final = self._weight_OI.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        return F.linear(x.to(self._dtype), self._weight_OI, self._bias_O)


class FrozenLinear(nn.Linear):
    """`nn.Linear` by its product."""

    product: Product

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """As the base class."""
        return self.product(input)


class FrozenAttention(LeanAttention):
    """`LeanAttention` by its products; `parts`: which of queries, keys and values come together."""

    parts: dict[tuple[int, int], Product]
    product: Product

    def projected(self, x_BLW: Tensor, first: int, last: int) -> Tensor:
        """As the base class."""
        product = self.parts.get((first, last))
        return super().projected(x_BLW, first, last) if product is None else product(x_BLW)

    def joined(self, heads_BLW: Tensor) -> Tensor:
        """As the base class."""
        return self.product(heads_BLW)


class FrozenPatches(PatchProjection):
    """`PatchProjection` by its product."""

    product: Product

    def projected(self, patches_BLK: Tensor) -> Tensor:
        """As the base class."""
        return self.product(patches_BLK)


class ScaledQuickGelu(QuickGELU):  # type: ignore[misc]
    """`1.702 × QuickGELU(x / 1.702)`, which is SiLU: one pass instead of three.

    The products beside it carry the scale in their weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """In place: the product before made `x` for this alone."""
        return F.silu(x, inplace=True)
