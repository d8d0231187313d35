"""The small trained additions themselves: low-rank products and bottlenecks.

Enters: what goes into a layer, x, and what comes out of it, y. Leaves: y with the addition. Held by the
layers of `hosts`, one for each projection.

An addition begins as nothing: its last matrix is zero, so that training starts from the model as it is.

Shape suffixes: I what a layer takes, O what it gives, R rank; "..." is any number of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune_model.adapters.config import LORA, AdapterConfig


class LowRank(nn.Module):
    """LoRA: y + scale · B A dropout(x) (Hu et al. 2021, equation 3). `down` is A, `up` is B.

    Dropout acts on x, before A; the layer's own product sees the whole x.
    """

    def __init__(self, inputs: int, outputs: int, config: AdapterConfig, like: Tensor) -> None:
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        self.down = nn.Parameter(like.new_empty(config.rank, inputs))
        self.up = nn.Parameter(like.new_zeros(outputs, config.rank))
        _begin(self.down)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., I], [..., O] → [..., O]."""
        return y + self.product(self.dropped(x)) * self.scale

    def dropped(self, x: Tensor) -> Tensor:
        """x with some of its numbers left out, while training."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def product(self, x: Tensor) -> Tensor:
        """B A x."""
        return F.linear(F.linear(x, self.down), self.up)

    def weight(self) -> Tensor:
        """[O, I] float64: what is added to the layer's weight when the adapter is merged."""
        return self.scale * (self.up.detach().double() @ self.down.detach().double())


class LowRankPointwise(LowRank):
    """The same of a 1 × 1 convolution: [B, I, H, W] → [B, O, h, w]."""

    def __init__(
        self, inputs: int, outputs: int, config: AdapterConfig, like: Tensor, stride: tuple[int, ...]
    ) -> None:
        super().__init__(inputs, outputs, config, like)
        self.stride = stride

    def product(self, x: Tensor) -> Tensor:
        """As the convolution walks."""
        inner = F.conv2d(x, self.down[:, :, None, None], stride=self.stride)
        return F.conv2d(inner, self.up[:, :, None, None])


class Bottleneck(nn.Module):
    """Houlsby et al. 2019, figure 2: y + U gelu(D dropout(y) + d) + u."""

    def __init__(self, outputs: int, config: AdapterConfig, like: Tensor) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.down = nn.Parameter(like.new_empty(config.rank, outputs))
        self.down_bias = nn.Parameter(like.new_zeros(config.rank))
        self.up = nn.Parameter(like.new_zeros(outputs, config.rank))
        self.up_bias = nn.Parameter(like.new_zeros(outputs))
        _begin(self.down)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., I], [..., O] → [..., O]. x is not looked at."""
        entered = F.dropout(y, self.dropout, self.training) if self.dropout else y
        inner = F.gelu(F.linear(entered, self.down, self.down_bias))
        return y + F.linear(inner, self.up, self.up_bias)


def path_for(
    config: AdapterConfig, inputs: int, outputs: int, like: Tensor, stride: tuple[int, ...] | None = None
) -> LowRank | Bottleneck:
    """The addition of one projection, on the device and in the type of `like`; `stride`: of a convolution."""
    like = like.detach()
    if config.kind != LORA:
        return Bottleneck(outputs, config, like)
    if stride is not None:
        return LowRankPointwise(inputs, outputs, config, like, stride)
    return LowRank(inputs, outputs, config, like)


def _begin(down: nn.Parameter) -> None:
    """As `nn.Linear`'s weight begins; drawn on the CPU, so that every device begins alike."""
    bound = 1 / math.sqrt(down.shape[1])
    with torch.no_grad():
        down.copy_(torch.empty(down.shape, device="cpu").uniform_(-bound, bound))


def added(paths: Any, name: str, x: Tensor, y: Tensor) -> Tensor:
    """y with the addition of this name, if there is one."""
    if name not in paths:
        return y
    result: Tensor = paths[name](x, y)
    return result
