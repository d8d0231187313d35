"""The logit scale, which is 1 / temperature: how it begins, and what it may become.

Enters: a model and what the spec says of its temperature. Leaves: the model's own `logit_scale`, which stores
the logarithm. Called before the first step and, through the objective, after each.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from cliptune.errors import SpecError
from cliptune_model.choice import Choice
from cliptune_trainer.losses.config import FIXED, GLOBAL, LossConfig


@torch.no_grad()
def begin(model: nn.Module, config: LossConfig) -> Choice:
    """Sets the first value, before the first step of a run; says what becomes of it."""
    log_scale = _log_scale(model)
    if config.logit_scale is not None:
        log_scale.fill_(math.log(config.logit_scale))
    elif config.temperature != FIXED:
        clamp(model, config)
    value = f"{float(log_scale.exp()):.4g}"
    whose = "the model's" if config.logit_scale is None else "asked for"
    reason = {
        FIXED: f"{whose}; it stays",
        GLOBAL: f"{whose}; learned with the robust loss, up to {config.max_logit_scale:g}",
    }.get(config.temperature, f"{whose}; learned, from 1 to {config.max_logit_scale:g}")
    return Choice(subject="logit_scale", value=value, reason=reason)


def hold(model: nn.Module, config: LossConfig) -> None:
    """Takes a fixed scale out of training; before the optimizer is made."""
    _log_scale(model).requires_grad_(config.temperature != FIXED)


@torch.no_grad()
def clamp(model: nn.Module, config: LossConfig) -> None:
    """Keeps a learned scale within [1, `max_logit_scale`], as Radford et al. 2021, section 2.5, has 100."""
    if config.temperature != FIXED:
        _log_scale(model).clamp_(0.0, math.log(config.max_logit_scale))


@torch.no_grad()
def clamp_bias(model: nn.Module, config: LossConfig) -> None:
    """Keeps a learned bias within what scaled similarities can reach, for those that are at most 1."""
    bias = getattr(model, "logit_bias", None)
    if bias is not None:
        bias.clamp_(-config.max_logit_scale, config.max_logit_scale)


def _log_scale(model: nn.Module) -> nn.Parameter:
    scale = getattr(model, "logit_scale", None)
    if scale is None:
        raise SpecError("the model has no logit scale", path="model.name")
    return cast(nn.Parameter, scale)
