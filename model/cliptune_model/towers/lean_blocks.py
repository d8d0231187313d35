"""Parts of open_clip's towers with less work and fewer copies, and the same results.

Enters and leaves: what the base classes take and give. `lean.make_lean` gives modules of a model these
classes; weights and their names stay as they are.

Shape suffixes: B batch, L tokens, W width, H heads, E width of a head, C channels, K values of a patch;
h, w: patches down and across, or an image's own height and width.
"""

from __future__ import annotations

from typing import cast

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torch.nn import functional as F


class LeanAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, batch first, that copies nothing.

    `causal`: a mask, where there is one, is the causal one.
    """

    causal: bool = False

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
        """As the base class; what open_clip's blocks ask of it goes the short way."""
        if key is not value or need_weights or key_padding_mask is not None or query.dim() != 3:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        heads = self.num_heads
        if query is key:
            projected = self.projected(query, 0, 3).chunk(3, dim=-1)
        else:
            projected = (self.projected(query, 0, 1), *self.projected(key, 1, 3).chunk(2, dim=-1))
        q_BHLE, k_BHLE, v_BHLE = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in projected)
        causal = self.causal and query is key and attn_mask is not None and attn_mask.dim() == 2
        mask = None if causal or attn_mask is None else attn_mask.to(q_BHLE.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(len(query), heads, *mask.shape[1:])
        out_BHLE = F.scaled_dot_product_attention(
            q_BHLE, k_BHLE, v_BHLE, mask, self.dropout if self.training else 0.0, is_causal=causal
        )
        return self.joined(out_BHLE.transpose(1, 2).flatten(2)), None

    def projected(self, x_BLW: Tensor, first: int, last: int) -> Tensor:
        """[B, L, W] → [B, L, W × parts]: of queries (0), keys (1) and values (2) those below `last`."""
        weight: Tensor = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if last - first < 3:
            part = slice(first * self.embed_dim, last * self.embed_dim)
            weight, bias = weight[part], None if bias is None else bias[part]
        return F.linear(x_BLW, weight, bias)

    def joined(self, heads_BLW: Tensor) -> Tensor:
        """[B, L, W] → [B, L, W]: what the heads found, as the module's answer."""
        return F.linear(heads_BLW, self.out_proj.weight, self.out_proj.bias)


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel: [B, C, H, W] → [B, W, h, w], channels last in memory."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """As the base class."""
        (down, across), (height, width) = self.stride, input.shape[-2:]
        h, w = height // down, width // across
        if h * down != height or w * across != width:
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # before the copy, which is then half as large
            input = input.to(torch.get_autocast_dtype(kind))  # noqa: A001
        rows, channels = input.shape[:2]
        grid_BChdwa = input.reshape(rows, channels, h, down, w, across)
        patches_BLK = grid_BChdwa.permute(0, 2, 4, 1, 3, 5).reshape(rows, h * w, -1)
        return self.projected(patches_BLK).transpose(1, 2).view(rows, -1, h, w)

    def projected(self, patches_BLK: Tensor) -> Tensor:
        """[B, L, K] → [B, L, W]."""
        return F.linear(patches_BLK, self.weight.flatten(1), self.bias)


class PooledBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """The last block of a tower. [B, L, W] → [B, 1, W]: the pooled token after this block."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        pooled_B: Tensor | None = None,
    ) -> Tensor:
        """`pooled_B`: the pooled token of each row of a causal tower. Without it an image's first token is
        pooled, and a text (what comes with a mask) goes through whole.
        """
        if pooled_B is None and attn_mask is not None:
            return cast(Tensor, super().forward(q_x, k_x, v_x, attn_mask))
        normed_BLW = self.ln_1(q_x)
        if pooled_B is None:
            x_B1W, query_B1W, mask = q_x[:, :1], normed_BLW[:, :1], None
        else:
            place_B11 = pooled_B.view(-1, 1, 1)
            x_B1W = q_x.take_along_dim(place_B11, dim=1)
            query_B1W = normed_BLW.take_along_dim(place_B11, dim=1)
            hidden_B1L = torch.arange(q_x.shape[1], device=q_x.device) > place_B11
            mask = torch.zeros_like(hidden_B1L, dtype=q_x.dtype).masked_fill(hidden_B1L, float("-inf"))
            mask = mask.repeat_interleave(self.attn.num_heads, dim=0)
        attended = self.attn(query_B1W, normed_BLW, normed_BLW, need_weights=False, attn_mask=mask)[0]
        x_B1W = x_B1W + self.ls_1(attended)
        return cast(Tensor, x_B1W + self.ls_2(self.mlp(self.ln_2(x_B1W))))


class PoolingTransformer(Transformer):  # type: ignore[misc]
    """A text tower's blocks, of which the last is a `PooledBlock`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, pooled_B: Tensor | None = None) -> Tensor:
        """[B, L, W] → [B, 1, W] at the places `pooled_B`; without them as the base class."""
        if pooled_B is None:
            return cast(Tensor, super().forward(x, attn_mask))
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, attn_mask=attn_mask)
        return cast(Tensor, last(x, attn_mask=attn_mask, pooled_B=pooled_B))


class ChannelsLastTimm(TimmModel):  # type: ignore[misc]
    """timm's convolutional towers, channels beside each other in memory: convolutions follow the input."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        """[B, C, h, w] → [B, W]."""
        features_BW: Tensor = super().forward(x_BChw.contiguous(memory_format=torch.channels_last))
        return features_BW


class ChannelsLastResNet(ModifiedResNet):  # type: ignore[misc]
    """open_clip's ResNets, likewise."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        """[B, C, h, w] → [B, W]."""
        features_BW: Tensor = super().forward(x_BChw.contiguous(memory_format=torch.channels_last))
        return features_BW
