"""The towers with less work for the same results: which parts a model takes, and putting them in.

Enters: a `Clip`. Leaves: the same model, some of whose modules have a class of `lean_blocks` now. Called by
the trainer before attention, checkpointing and compilation are installed, and by the benchmarks.

    attention   queries, keys and values stay views of one product; torch's own module copies them, its input
                and its output into other layouts. The causal mask is said, not shown: fused kernels serve it
    patches     those that do not overlap, as one matrix product instead of a convolution
    pooling     a tower's last block for the pooled token alone: no other token of it is ever read. Saves 10
                of 12 parts of a block's products: 7 % of a tower of 12 blocks
    layout      images enter convolutional towers with their channels beside each other in memory, as a CPU's
                convolutions like them: a step of cliptune-mini on one core in 0.72 of the time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.towers.lean_blocks import (
    ChannelsLastResNet,
    ChannelsLastTimm,
    LeanAttention,
    PatchProjection,
    PooledBlock,
    PoolingTransformer,
)
from cliptune_model.towers.text_tower import text_tower

PARTS: Final = ("attention", "patches", "pooling", "layout")
_CPU_ALONE: Final = frozenset({"layout"})  # elsewhere nobody has measured it

_CHANNELS_LAST: Final[dict[type[nn.Module], type[nn.Module]]] = {
    TimmModel: ChannelsLastTimm,
    ModifiedResNet: ChannelsLastResNet,
}


def choose_lean(clip: Clip) -> Choice:
    """Which parts apply to this model on its device, and why."""
    if clip.device.type == "mps":
        reason = "proved on CPU and CUDA alone; on Apple's GPU open_clip's own modules run"
        return Choice(subject="lean_towers", value="off", reason=reason)
    possible = [part for part in PARTS if clip.device.type == "cpu" or part not in _CPU_ALONE]
    parts = [part for part in possible if any(_replacements(clip.model, part))]
    if not parts:
        reason = "no tower is open_clip's own transformer, or convolutional on a CPU"
        return Choice(subject="lean_towers", value="off", reason=reason)
    return Choice(
        subject="lean_towers",
        value=", ".join(parts),
        reason="the same results with fewer products and copies",
    )


def make_lean(clip: Clip, choice: Choice) -> None:
    """Puts in the parts that `choice` names. Again: changes nothing."""
    wanted = choice.value.split(", ")
    for part in PARTS:
        for module, kind in list(_replacements(clip.model, part)) if part in wanted else ():
            module.__class__ = kind
    text, _ = text_tower(clip.model)
    if text is not None and text.module.attn_mask is not None:
        for block in text.module.transformer.resblocks:
            if isinstance(block.attn, LeanAttention):
                block.attn.causal = _is_causal(text.module.attn_mask)


def _replacements(model: nn.Module, part: str) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Modules of exactly the classes that the parts are written for; anything else stays as it is."""
    visual: Any = model.visual if type(model.visual) is VisionTransformer else None
    tower, why_not = text_tower(model)
    text = None if tower is None else tower.module
    if part == "attention":
        for transformer in (side.transformer for side in (visual, text) if side is not None):
            yield from ((block.attn, LeanAttention) for block in transformer.resblocks if _plain(block))
    elif part == "patches":
        if visual is not None and _tiles(visual.conv1):
            yield visual.conv1, PatchProjection
    elif part == "pooling":
        if visual is not None and _pools_first(visual) and _ends_plain(visual.transformer):
            yield visual.transformer.resblocks[-1], PooledBlock
        if (
            tower is not None
            and not why_not
            and not tower.class_token
            and _ends_plain(tower.module.transformer)
        ):
            yield tower.module.transformer.resblocks[-1], PooledBlock
            yield tower.module.transformer, PoolingTransformer
    elif part == "layout":
        tower_module = cast(nn.Module, model.visual)
        kind = _CHANNELS_LAST.get(type(tower_module))
        if kind is not None and any(isinstance(inner, nn.BatchNorm2d) for inner in tower_module.modules()):
            yield tower_module, kind


def _plain(block: Any) -> bool:
    attention = getattr(block, "attn", None)
    return (
        type(attention) is nn.MultiheadAttention
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def _tiles(convolution: Any) -> bool:
    """Patches beside each other, neither apart nor one over another."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )


def _pools_first(visual: Any) -> bool:
    return visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens


def _ends_plain(transformer: Any) -> bool:
    return (
        type(transformer) is Transformer
        and transformer.batch_first
        and type(transformer.resblocks[-1]) is ResidualAttentionBlock
    )


def _is_causal(mask_LL: Tensor) -> bool:
    hidden_LL = torch.ones_like(mask_LL, dtype=torch.bool).triu(1)
    return torch.equal(mask_LL, torch.zeros_like(mask_LL).masked_fill(hidden_LL, float("-inf")))
