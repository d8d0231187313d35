"""The bias of the logits, which the sigmoid loss needs and most models lack.

Enters: a model. Leaves: the same with a bias that the loss can start from. Called by the planner, and by the
loop with the first batch.
B: pairs, D: embedding dimension.
"""

from __future__ import annotations

import math
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_trainer.data.loading.loader import Batch

# Zhai et al. 2023, section 3.2: from random weights. Each row has one positive among many negatives.
RANDOM_SCALE: Final = 10.0
RANDOM_BIAS: Final = -10.0
# Of a model that was trained without one, until it is calibrated. No trained bias is exactly this.
UNCALIBRATED: Final = 0.0
_CALIBRATION_PAIRS: Final = 256


def ensure_bias(clip: Clip) -> Choice:
    """Gives the model a bias if it has none; says what it will be."""
    subject = "logit_bias"
    model: Any = clip.model
    if getattr(model, "logit_bias", None) is None:
        like = cast(Tensor, model.logit_scale)
        start = UNCALIBRATED if clip.pretrained else RANDOM_BIAS
        model.logit_bias = nn.Parameter(torch.full_like(like, start))
        # So that a checkpoint and an export are loaded with it.
        clip.model_config["init_logit_bias"] = start
        if not clip.pretrained:
            with torch.no_grad():
                like.fill_(math.log(RANDOM_SCALE))
    if needs_calibration(clip):
        reason = "the model was trained without one; it is set between matching and other pairs"
        return Choice(subject=subject, value="from the first batch", reason=reason)
    reason = "the model has it" if clip.pretrained else "the usual start for random weights"
    return Choice(subject=subject, value=f"{float(model.logit_bias.detach()):.4g}", reason=reason)


def needs_calibration(clip: Clip) -> bool:
    """Whether the bias is still what `ensure_bias` began with."""
    bias = getattr(clip.model, "logit_bias", None)
    return bias is not None and clip.pretrained and float(bias.detach()) == UNCALIBRATED


@torch.no_grad()
def calibrate(clip: Clip, batch: Batch, micro_batch_size: int) -> float:
    """Sets the bias so that logits are 0 half-way between the mean of matching and of other pairs.

    Returns the bias. A softmax model's scale of 100 without it makes every negative a confident positive.
    """
    count = min(len(batch.tokens_BL), _CALIBRATION_PAIRS)
    training = clip.model.training
    clip.model.eval()
    images, texts, similarity = [], [], clip.similarity
    for start in range(0, count, micro_batch_size):
        rows = slice(start, min(start + micro_batch_size, count))
        images.append(clip.encode_images(batch.images_B3HW[rows].to(clip.device)))
        texts.append(clip.encode_texts(batch.tokens_BL[rows].to(clip.device)))
    clip.model.train(training)
    similarity_BB = similarity(torch.cat(images), torch.cat(texts))
    matching = float(similarity_BB.diagonal().mean())
    others = (float(similarity_BB.sum()) - matching * count) / max(1, count * (count - 1))
    bias = -clip.logit_scale * (matching + others) / 2
    cast(Tensor, clip.model.logit_bias).fill_(bias)
    return bias
