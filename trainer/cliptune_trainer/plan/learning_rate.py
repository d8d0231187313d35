"""The peak learning rate of a job that names none.

Enters: the model, the training rows, the steps. Leaves: a `Choice` with its reason. Called by `decide`.

Published fine-tunings of CLIP lie between 1e-6 (few-shot) and 3e-5 (WiSE-FT, Wortsman et al. 2022), most at
1e-5 (FLYP, Goyal et al. 2023), with models whose weights are about 0.024 large, as a ViT-B-32's. AdamW moves
each weight by about the learning rate in a step, however small its gradient is; so what counts is the rate
relative to the weights (You et al. 2020, LAMB, section 3), and a smaller model, whose weights are larger,
bears more.
"""

from __future__ import annotations

import math
from typing import Final

from torch import nn

from cliptune_model.adapters.config import BOTTLENECK, LORA
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip

RANDOM_LEARNING_RATE: Final = 5e-4
# Adapters begin as nothing and are small: LoRA as Zanella and Ben Ayed 2024 (CLIP-LoRA), bottlenecks between
# the rates of Houlsby et al. 2019, section 3.2.
_ADAPTER_RATES: Final = {LORA: 2e-4, BOTTLENECK: 3e-4}
# They are for runs of a thousand steps or more. What an adapter adds grows from nothing by about the rate in
# each step, so that fewer steps need a rate higher by as much, up to here (docs/adapters.md has figures).
_MOST_FOR_ADAPTERS: Final = {LORA: 25.0, BOTTLENECK: 10.0}
# 1e-5 for a ViT-B-32.
_SHARE_OF_WEIGHTS: Final = 4.2e-4
_LEAST, _MOST = 1e-6, 1e-4
# Fewer rows are soon learned by heart: the rate falls with their square root.
_FEW_ROWS: Final = 1000
# Few steps go less far at the same rate: it rises with the square root of what is missing, at most so far.
_FEW_STEPS: Final = 1000
_MOST_FOR_FEW_STEPS: Final = 3.0


def choose_learning_rate(clip: Clip, *, rows: int, total_steps: int) -> Choice:
    """The default.

    Args:
        clip: as training starts from it.
        rows: training rows.
        total_steps: of the run.
    """
    if clip.adapter is not None:
        kind = clip.adapter.config.kind
        times = min(max(1.0, _FEW_STEPS / total_steps), _MOST_FOR_ADAPTERS[kind])
        rate = _ADAPTER_RATES[kind] * times
        why = f"usual for adapters: {kind}"
        if times > 1:
            why += f"; {total_steps} steps are few, and it begins as nothing: × {times:.2g}"
        return Choice(subject="learning_rate", value=f"{rate:.2g}", reason=why)
    if not clip.pretrained:
        return Choice(
            subject="learning_rate", value=f"{RANDOM_LEARNING_RATE:g}", reason="the weights are random"
        )
    size = weight_size(clip.model)
    of_rows = min(1.0, math.sqrt(rows / _FEW_ROWS))
    of_steps = min(max(1.0, math.sqrt(_FEW_STEPS / total_steps)), _MOST_FOR_FEW_STEPS)
    value = min(max(_SHARE_OF_WEIGHTS * size * of_rows * of_steps, _LEAST), _MOST)
    reasons = [f"the weights are pretrained and about {size:.2g} large"]
    if of_rows < 1:
        reasons.append(f"{rows} rows are few: × {of_rows:.2g}")
    if of_steps > 1:
        reasons.append(f"{total_steps} steps are few: × {of_steps:.2g}")
    return Choice(subject="learning_rate", value=f"{value:.2g}", reason="; ".join(reasons))


def weight_size(model: nn.Module) -> float:
    """Root mean square of the weights of all layers that multiply, embeddings aside."""
    total, count = 0.0, 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2 and "embed" not in name:
                total += float(weight.detach().float().square().sum())
                count += weight.numel()
    return math.sqrt(total / count) if count else 0.0
