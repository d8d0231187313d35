"""Tiny CLIPs of every layout of attention and MLP that adapters know, and adapters that do something."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune_model.adapters import AdapterConfig, BaseIdentity, attach, base_state, digest
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_model.towers.image_tower import encode_image
from cliptune_model.towers.text_tower import encode_text

SOURCE = ModelSource(name="cliptune-test-vit")
SIZE = 32
VOCABULARY = 49408
_VISION: dict[str, Any] = {
    "image_size": SIZE,
    "layers": 2,
    "width": 32,
    "head_width": 16,
    "patch_size": 8,
}
_TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
_TIMM: dict[str, Any] = {"image_size": SIZE, "timm_pool": "avg", "timm_proj": "linear"}


class SeparateAttention(nn.Module):
    """As the hub's CLIP writes it: four projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, *_others: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Any:
        q, k, v = (
            make(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for make in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return (self.out_proj(out.transpose(1, 2).flatten(2)),)


def _model(kind: str) -> Any:
    if kind == "vit":
        return open_clip.CLIP(32, _VISION, _TEXT)
    if kind == "separate":
        model = open_clip.CLIP(32, _VISION, _TEXT)
        for transformer in (model.visual.transformer, model.transformer):
            for block in transformer.resblocks:
                block.attn = SeparateAttention(32, 2)
        return model
    if kind == "siglip":
        text = {**_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        vision = {**_TIMM, "timm_model_name": "test_vit3", "timm_pool": "", "timm_proj": "none"}
        return open_clip.CustomTextCLIP(96, vision, text, init_logit_bias=-10.0)
    if kind in ("efficientnet", "convnext"):
        return open_clip.CustomTextCLIP(32, {**_TIMM, "timm_model_name": f"test_{kind}"}, _TEXT)
    if kind == "resnet":
        return open_clip.CLIP(32, {"image_size": SIZE, "layers": (1, 1, 1, 1), "width": 8}, _TEXT)
    if kind == "coca":
        return CoCa(
            32,
            multimodal_cfg={
                "width": 32,
                "heads": 2,
                "layers": 2,
                "context_length": 16,
                "vocab_size": VOCABULARY,
            },
            text_cfg={**_TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg={**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        )
    raise ValueError(kind)


LAYOUTS = ("vit", "separate", "siglip", "efficientnet", "convnext", "resnet", "coca")


@cache
def _built(kind: str) -> Clip:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(kind).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "bn3.weight")):  # branches begin as nothing: here all count
                parameter.data.fill_(1.0)
        return replace(build(SOURCE), model=model, image_size=(SIZE, SIZE), embedding_dim=32)


def layout_clip(kind: str) -> Clip:
    """A CLIP of this layout on the CPU, in evaluation mode; always the same random weights."""
    clip = _built(kind)
    return replace(clip, model=deepcopy(clip.model))


def identity(clip: Clip, source: ModelSource = SOURCE) -> BaseIdentity:
    return BaseIdentity(source=source, seed=0, sha256=digest(base_state(clip.model)))


def adapted(
    clip: Clip, config: AdapterConfig | None = None, seed: int = 5, base: BaseIdentity | None = None
) -> Clip:
    """With a new adapter whose last matrices are no zeros, as if it had been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = attach(clip, config or AdapterConfig(dropout=0.0), base or identity(clip))
        for name, parameter in clip.model.named_parameters():
            if name.endswith((".up", ".up_bias", ".down_bias")):
                parameter.data.normal_(std=0.1)
    return clip


def pictures(rows: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def words(rows: int = 3) -> Tensor:
    """Tokens of texts of several lengths."""
    tokens_BL = torch.zeros(rows, 16, dtype=torch.int64)
    for row in range(rows):
        tokens_BL[row, : 4 + row] = torch.arange(300 + row, 304 + 2 * row)
        tokens_BL[row, 4 + row] = VOCABULARY - 1
    return tokens_BL


def features(clip: Clip, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of images and texts, as the towers give them."""
    return encode_image(clip.model, pictures(dtype=dtype)), encode_text(clip.model, words())
