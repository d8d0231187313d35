"""Small CLIPs of every kind of tower, with random weights, and batches for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn

from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.data.loading.loader import Batch

IMAGE_SIZE = 32
_VISION: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "layers": 2,
    "width": 32,
    "head_width": 16,
    "patch_size": 8,
}
_TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_TIMM: dict[str, Any] = {"image_size": IMAGE_SIZE, "timm_pool": "avg", "timm_proj": "linear"}


def _model(kind: str) -> nn.Module:
    if kind == "vit":
        return open_clip.CLIP(32, _VISION, _TEXT)
    if kind == "patch-dropout":
        return open_clip.CLIP(32, {**_VISION, "patch_dropout": 0.5}, _TEXT)
    if kind == "dropout":  # timm's own dropout and stochastic depth
        vision = {**_TIMM, "timm_model_name": "test_vit", "timm_drop": 0.3, "timm_drop_path": 0.3}
        return open_clip.CustomTextCLIP(32, {**vision, "timm_pool": ""}, _TEXT, init_logit_bias=-10.0)
    if kind == "convnext":
        return open_clip.CustomTextCLIP(32, {**_TIMM, "timm_model_name": "test_convnext"}, _TEXT)
    if kind == "timm-resnet":
        return open_clip.CustomTextCLIP(32, {**_TIMM, "timm_model_name": "test_resnet"}, _TEXT)
    if kind == "resnet":
        return open_clip.CLIP(32, {"image_size": IMAGE_SIZE, "layers": (2, 1, 1, 1), "width": 8}, _TEXT)
    if kind == "siglip":
        text = {**_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        return open_clip.CustomTextCLIP(32, _VISION, text, init_logit_bias=-10.0)
    if kind == "coca":
        return CoCa(
            32,
            multimodal_cfg={"width": 32, "heads": 2, "layers": 2, "context_length": 16, "vocab_size": 49408},
            text_cfg={**_TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg={**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        )
    raise ValueError(kind)


def small_clip(kind: str, seed: int = 0) -> Clip:
    """A CLIP of that kind on the CPU, in training mode. Its embedding has 32 numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(kind)
    return replace(build(ModelSource(name="cliptune-test-vit")), model=model.train())


def small_batch(rows: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, full: bool = False) -> Batch:
    """Noise and random texts of several lengths; every third caption is the same.

    With `full`, labels and wrong captions too: all that any loss may need.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(1, 49000, (rows, 16), generator=generator)
    lengths_B = torch.randint(4, 16, (rows,), generator=generator)
    places_L = torch.arange(16)
    tokens_BL[places_L[None, :] > lengths_B[:, None]] = 0
    tokens_BL[torch.arange(rows), lengths_B] = 49407  # the end-of-text token
    batch = Batch(
        epoch=0,
        index=0,
        images_B3HW=torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype),
        tokens_BL=tokens_BL,
        image_ids_B=torch.arange(rows),
        caption_ids_B=torch.arange(rows) % 3,
    )
    if not full:
        return batch
    places_B = torch.arange(rows)
    return replace(
        batch,
        labels_BC=torch.stack([places_B % 2 == 0, places_B % 3 == 0], dim=1).float(),
        negative_tokens_BL=tokens_BL.roll(1, dims=0).roll(1, dims=1),
        negative_ids_B=torch.where(places_B % 4 == 3, -2, -1),
    )


def gradients(clip: Clip) -> dict[str, Tensor]:
    """The gradients in a model's parameters, taken out of it."""
    found = {
        name: parameter.grad
        for name, parameter in clip.model.named_parameters()
        if parameter.grad is not None
    }
    clip.model.zero_grad(set_to_none=True)
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of any parameter's gradient."""
    assert one.keys() == other.keys()
    # A gradient that is 0 but for rounding (a key's bias) is compared with the others' size.
    size = max(float(value.norm()) for value in other.values())
    return max(
        float((one[name] - value).norm() / max(float(value.norm()), 1e-3 * size))
        for name, value in other.items()
    )
