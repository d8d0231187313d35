"""A text as the weighted sum of its words, and a transformer that begins as exactly that.

Enters: a vector for each of CLIP's tokens. Leaves: `Bag`, trained by `texts.py` in minutes on a CPU, and a
text tower whose first layer computes it (`begin_as`), so that training the tower does not start from noise.

Shape suffixes: V vocabulary, C content (the width less `RESERVED`), D embedding, B batch, L tokens, W width.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The first two numbers of a token's embedding: its weight, and whether it marks the start or end of a text.
WEIGHT: Final = 0
MARK: Final = 1
RESERVED: Final = 2
_MARKS: Final = (49406, 49407)
_LOUD: Final = 10.0  # how much larger than the marks the sum is
_EXCLUDED: Final = -40.0


class Bag(nn.Module):
    """Tokens [B, L], 0 after the end → unit vectors [B, D]."""

    def __init__(self, words_VD: Tensor, content: int) -> None:
        super().__init__()
        _, _, directions_DC = torch.pca_lowrank(words_VD, q=content, niter=4, center=False)
        begun_VC = words_VD @ directions_DC
        norm_V1 = begun_VC.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        self.content_VC = _table(begun_VC / norm_V1)
        weight_V1 = (norm_V1 / norm_V1.median()).log().clamp(-2, 2)
        self.weight_V1 = _table(weight_V1)
        self.projection_CD = nn.Parameter(directions_DC.T.contiguous())

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """The weighted mean of the words, without the marks."""
        word_BL1 = ((tokens_BL != 0) & (tokens_BL < min(_MARKS)))[..., None]
        share_BL1 = self.weight_V1(tokens_BL).masked_fill(~word_BL1, -30.0).softmax(1)
        content_BLC = F.normalize(self.content_VC(tokens_BL), dim=-1)
        return F.normalize((share_BL1 * content_BLC).sum(1) @ self.projection_CD, dim=-1)


def _table(rows_VC: Tensor) -> nn.Embedding:
    """To be trained from these rows; its gradients are sparse."""
    table = nn.Embedding(rows_VC.shape[0], rows_VC.shape[1], sparse=True)
    table.weight = nn.Parameter(rows_VC.contiguous())
    return table


@torch.no_grad()
def begin_as(model: Any, bag: Bag) -> None:
    """Set the tower's weights so that it computes the bag; layers after the first add nothing yet.

    Every embedding gets the same length, so that layer norm is the same scale for all. In the first layer
    each query is one constant and a key is the token's weight, which makes the attention of the end mark the
    bag's shares; the values are the contents.
    """
    words = model.token_embedding.weight
    width = words.shape[1]
    content_VC = F.normalize(bag.content_VC.weight, dim=-1)
    weight_V = bag.weight_V1.weight[:, 0].clamp(-4, 4)
    words.zero_()
    words[:, RESERVED:] = content_VC
    words[:, WEIGHT] = weight_V * 0.05
    words[list(_MARKS)] = 0.0
    words[list(_MARKS), MARK] = 1.0
    model.positional_embedding.mul_(0.02)

    first = model.transformer.resblocks[0]
    heads = first.attn.num_heads
    each = width // heads
    # Layer norm brings a vector of length 1 to the length of the root of the width.
    unit = width**0.5
    first.attn.in_proj_weight.zero_()
    first.attn.in_proj_bias.zero_()
    for head in range(heads):
        query, key = head * each, width + head * each
        first.attn.in_proj_bias[query] = each**0.5
        first.attn.in_proj_weight[key, WEIGHT] = 1 / (0.05 * unit)
        first.attn.in_proj_weight[key, MARK] = _EXCLUDED / unit
    contents = torch.arange(RESERVED, width)
    first.attn.in_proj_weight[2 * width + contents, contents] = 1 / unit
    first.attn.out_proj.weight.copy_(_LOUD * torch.eye(width))
    first.attn.out_proj.bias.zero_()
    for block in model.transformer.resblocks:
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
        if block is not first:
            block.attn.out_proj.weight.zero_()
            block.attn.out_proj.bias.zero_()
    model.text_projection.zero_()
    model.text_projection[RESERVED:] = bag.projection_CD / unit
