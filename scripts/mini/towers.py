"""The configurations of both models, in open_clip's form, and their towers as modules.

Leaves: configurations for `pack`, modules for the steps that train them. Shape suffixes: B batch, L tokens,
D embedding.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Final

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.mini import trunk

MINI: Final = "cliptune-mini"
VIT: Final = "cliptune-mini-vit"
VOCABULARY: Final = 49408  # CLIP's own: open_clip's tokeniser gives no other
CONTEXT: Final = 77
# timm's MLP is twice as wide inside as its output: room for a unit for each of ImageNet's classes. The
# teacher's vectors are shorter; the rest of a text's is 0.
EMBED_DIM: Final = 512

MODEL_CONFIG: Final[dict[str, dict[str, Any]]] = {
    MINI: {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "timm_model_name": trunk.NAME,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "mlp",
            "timm_proj_bias": True,
            "image_size": trunk.IMAGE_SIZE,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": 160,
            "heads": 5,
            "layers": 4,
        },
    },
    VIT: {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": 128, "layers": 7, "width": 160, "head_width": 32, "patch_size": 16},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": 64,
            "heads": 4,
            "layers": 3,
        },
    },
}


def preprocess_config(name: str) -> dict[str, Any]:
    """The whole image on white: nothing is cut off, and clip art and icons look as they did in training."""
    return {
        "size": MODEL_CONFIG[name]["vision_cfg"]["image_size"],
        "mode": "RGB",
        "mean": list(trunk.MEAN),
        "std": list(trunk.STD),
        "interpolation": "bicubic",
        "resize_mode": "longest",
        "fill_color": 255,
    }


def build(name: str) -> open_clip.CLIP:
    """The whole model with random weights, fp32."""
    config = deepcopy(MODEL_CONFIG[name])
    return open_clip.CLIP(**config)


def widened(vectors_ND: Tensor) -> Tensor:
    """The teacher's vectors with zeros to `EMBED_DIM`."""
    return F.pad(vectors_ND, (0, EMBED_DIM - vectors_ND.shape[-1]))


def encode_text(model: nn.Module, tokens_BL: Tensor) -> Tensor:
    """open_clip's text tower for texts that are shorter than the context: [B, L] → [B, D], not normalised.

    A causal tower never reads past the end of a text, so the positions after it may be left out.
    """
    any_model: Any = model
    length = tokens_BL.shape[1]
    states_BLW = any_model.token_embedding(tokens_BL) + any_model.positional_embedding[:length]
    states_BLW = any_model.transformer(states_BLW, attn_mask=any_model.attn_mask[:length, :length])
    ends_B = tokens_BL.argmax(-1)  # the end-of-text token has the highest number
    last_BW = any_model.ln_final(states_BLW)[torch.arange(len(tokens_BL), device=tokens_BL.device), ends_B]
    projected_BD: Tensor = last_BW @ any_model.text_projection
    return projected_BD
