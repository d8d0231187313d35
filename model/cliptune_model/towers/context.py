"""Longer texts for a text tower that was trained on short ones: its position embeddings, stretched.

Enters: open_clip's model with its weights, and how many tokens a text shall have. Leaves: the same model with
that context, and its configuration. Called by `cliptune_model.clip.build`.

The method is Long-CLIP's knowledge-preserved stretching (Zhang et al. 2024): the first 20 positions, which
nearly all captions of pre-training reach, are kept; the rest, hardly trained, are interpolated linearly, at
most 4 times as many. 77 positions make up to 248. The tower is causal, so a text within the kept positions
embeds as before; longer texts need fine-tuning.

Shape suffixes: L positions, W width.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Final

import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn

from cliptune.errors import ContextLengthError
from cliptune_model.source import MAX_CONTEXT
from cliptune_model.towers.text_tower import text_tower

KEPT_POSITIONS: Final = 20
MOST_STRETCH: Final = 4


def extend_context(
    model: nn.Module, model_config: dict[str, Any], context_length: int, *, name: str
) -> dict[str, Any]:
    """Give `model` positions for texts of `context_length` tokens, in place; returns its new configuration.

    A model that has exactly these is left as it is.

    Raises:
        ContextLengthError: fewer tokens than the model has, more than stretching gives, or a text tower that
            cannot be stretched: one of another library, one that reads the padding too.
    """
    tower, why_not = text_tower(model)
    if tower is not None and tower.context_length == context_length:
        return model_config
    if tower is None or why_not:
        raise ContextLengthError(
            f"{name!r} cannot take texts of {context_length} tokens: {why_not}. "
            "Leave model.context_length out, or take a model with a causal text tower, as ViT-B-32",
            wanted=context_length,
        )
    limit = longest_context(tower.context_length)
    if not tower.context_length < context_length <= limit:
        shorter = context_length < tower.context_length
        raise ContextLengthError(
            f"{name!r} takes texts of {tower.context_length} tokens, and of up to {limit} once stretched; "
            f"model.context_length = {context_length} is "
            + (
                "shorter than what it has: shorter texts need no shorter context"
                if shorter
                else "beyond that"
            ),
            wanted=context_length,
            found=tower.context_length,
            limit=limit,
        )
    module, positions_LW = tower.module, tower.module.positional_embedding
    class_1W = positions_LW[
        tower.context_length :
    ]  # CoCa's class token, behind the text: its own stays its own
    with torch.no_grad():
        stretched_LW = stretch_positions(positions_LW[: tower.context_length], context_length)
        module.positional_embedding = nn.Parameter(
            torch.cat([stretched_LW, class_1W]), requires_grad=positions_LW.requires_grad
        )
    module.attn_mask = _causal_mask(len(module.positional_embedding), like=module.attn_mask)
    for holder in (module, model):
        holder.context_length = context_length
    if hasattr(module, "num_pos"):
        module.num_pos = len(module.positional_embedding)
    extended = deepcopy(model_config)
    extended["text_cfg"]["context_length"] = context_length
    if isinstance(model, CoCa):
        model.text_decoder.context_length = context_length
        model.text_decoder.attn_mask = _causal_mask(context_length, like=model.text_decoder.attn_mask)
        extended["multimodal_cfg"]["context_length"] = context_length
    return extended


def longest_context(context_length: int) -> int:
    """The most tokens that a tower with positions for `context_length` can be stretched to."""
    stretched = context_length + (MOST_STRETCH - 1) * max(0, context_length - KEPT_POSITIONS)
    return max(context_length, min(MAX_CONTEXT, stretched))


def stretch_positions(positions_LW: Tensor, length: int) -> Tensor:
    """[L, W] → [length, W]: the first 20 as they are, the others interpolated, the last ones extrapolated.

    Position p from 20 on lies at 20 + (p - 20) / r of the old ones, r = (length - 20) / (L - 20). For 77 and
    248, r is 4 and the result is the authors' own.
    """
    found = len(positions_LW)
    place = torch.arange(length, device=positions_LW.device, dtype=torch.float64)
    rest = (place - KEPT_POSITIONS).clamp_(min=0) * (found - KEPT_POSITIONS) / (length - KEPT_POSITIONS)
    place = place.clamp_(max=KEPT_POSITIONS) + rest
    before = place.floor().clamp_(max=found - 2)
    share_L1 = (place - before).to(positions_LW.dtype)[:, None]
    before_L = before.to(torch.int64)
    return positions_LW[before_L] * (1 - share_L1) + positions_LW[before_L + 1] * share_L1


def _causal_mask(length: int, *, like: Tensor) -> Tensor:
    return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
