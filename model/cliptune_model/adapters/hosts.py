"""Layers that carry adapters: the classes that a model's own layers are given.

Enters and leaves: what the layers take and give. `attach` gives modules of a model these classes and puts
their additions beside their weights; weights and their names stay as they are. A lean, compiled,
checkpointed or sliced tower calls them as it calls the layers that they were.

Shape suffixes: B batch, L queries, S keys, W width, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune_model.adapters.paths import added
from cliptune_model.towers.lean_blocks import LeanAttention

# Of a projection that makes several things at once: name → (first, last) of its outputs.
Slices = dict[str, tuple[int, int]]


class AdaptedLinear(nn.Linear):
    """A linear layer with one addition, or one for each slice of what it gives (a fused q, k, v)."""

    adapter: nn.ModuleDict
    slices: Slices

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """As the base class, and the additions."""
        y = super().forward(input)
        if not self.slices:
            (path,) = self.adapter.values()
            return cast(Tensor, path(input, y))
        pieces = [
            added(self.adapter, name, input, y[..., first:last])
            for name, (first, last) in self.slices.items()
        ]
        return torch.cat(pieces, dim=-1)


class AdaptedPointwise(nn.Conv2d):
    """A 1 × 1 convolution with an addition."""

    adapter: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """As the base class, and the addition."""
        (path,) = self.adapter.values()
        return cast(Tensor, path(input, super().forward(input)))


class AdaptedAttention(LeanAttention):
    """`nn.MultiheadAttention` with additions to its query, key, value and output projections.

    torch's own hands its weights to one function, which knows nothing of adapters, so attention is written
    out here, as the lean one is.
    """

    adapter: nn.ModuleDict

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, W], [B, S, W], [B, S, W] → [B, L, W], and no weights: `NotImplementedError` where asked."""
        if need_weights or key_padding_mask is not None or query.dim() != 3:
            raise NotImplementedError("an adapted attention gives no weights and takes no padding mask")
        same = query is key and key is value
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        entering = {"q": query, "k": key, "v": value}
        heads = self.num_heads
        q_BHLE, k_BHSE, v_BHSE = (
            added(self.adapter, name, entering[name], projected)
            .view(*projected.shape[:2], heads, -1)
            .transpose(1, 2)
            for name, projected in zip("qkv", self._projected(query, key, value, same), strict=True)
        )
        causal = self.causal and same and attn_mask is not None and attn_mask.dim() == 2
        mask = None if causal else _shown(attn_mask, q_BHLE)
        out_BHLE = F.scaled_dot_product_attention(
            q_BHLE, k_BHSE, v_BHSE, mask, self.dropout if self.training else 0.0, is_causal=causal
        )
        out_BLW = out_BHLE.transpose(1, 2).flatten(2)
        given_BLW = F.linear(out_BLW, self.out_proj.weight, self.out_proj.bias)
        given_BLW = added(self.adapter, "o", out_BLW, given_BLW)
        return (given_BLW if self.batch_first else given_BLW.transpose(0, 1)), None

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, same: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and same:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        separate: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), weights, biases)
        return q, k, v


def _shown(attn_mask: Tensor | None, q_BHLE: Tensor) -> Tensor | None:
    """`nn.MultiheadAttention`'s mask, in which True hides, as `scaled_dot_product_attention` takes it."""
    if attn_mask is None:
        return None
    mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q_BHLE.dtype)
    return mask.view(*q_BHLE.shape[:2], *mask.shape[1:]) if mask.dim() == 3 else mask


# Of a model's own class, the class that carries adapters.
HOSTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AdaptedLinear,
    nn.Conv2d: AdaptedPointwise,
    nn.MultiheadAttention: AdaptedAttention,
    LeanAttention: AdaptedAttention,
}


def is_host(module: nn.Module) -> bool:
    """Whether a module carries adapters."""
    return isinstance(module, AdaptedLinear | AdaptedPointwise | AdaptedAttention)
