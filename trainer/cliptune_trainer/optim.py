"""AdamW with the groups that CLIP needs.

Enters: a model and its learning rate. Leaves: an optimizer, and its state as named tensors for checkpoints.
Called by the loop. Biases, norms, class and position embeddings and the logit scale take no weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from cliptune_model.hardware import host
from cliptune_model.rules import choose_fused_optimizer

# As open_clip trains its ViTs.
BETAS: Final = (0.9, 0.98)
EPS: Final = 1e-6
_FUSING: Final = ("cpu", "cuda", "mps")
MAX_LOG_SCALE: Final = math.log(100.0)
_NO_DECAY: Final = frozenset(
    {
        "class_embedding",
        "positional_embedding",
        "cls_token",
        "pos_embed",
        "cls_emb",
        "logit_scale",
        "logit_bias",
    }
)


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    scaled: bool = False,
    fused: bool | None = None,
) -> AdamW:
    """AdamW over all trainable parameters, in two groups: with decay and without.

    Args:
        model: fp32 master weights, on their device.
        learning_rate: of the first step.
        weight_decay: of matrices.
        scaled: a gradient scaler is in use.
        fused: by the policy; None: wherever nothing is known against it.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in trainable if takes_decay(name, parameter)]
    others = [(name, parameter) for name, parameter in trainable if not takes_decay(name, parameter)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    device = trainable[0][1].device.type
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=BETAS,
        eps=EPS,
        fused=_can_fuse(device, scaled) if fused is None else fused,
    )


def takes_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in _NO_DECAY


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keeps the logit scale in [1, 100], as Radford et al. 2021, section 2.5; stored as its logarithm."""
    cast(Tensor, model.logit_scale).clamp_(0.0, MAX_LOG_SCALE)


def state_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """Adam's state as "PARAMETER/exp_avg", "PARAMETER/exp_avg_sq", "PARAMETER/step"."""
    return {
        f"{name}/{key}": value
        for name, parameter in _named(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `state_tensors`, for an optimizer of the same model. Raises KeyError for another's."""
    places = {name: place for place, name in enumerate(_named(optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        state.setdefault(places[name], {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _named(optimizer: AdamW) -> dict[str, Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _can_fuse(device: str, scaled: bool) -> bool:
    machine = replace(host(), accelerator=device)
    return device in _FUSING and choose_fused_optimizer(machine, scaled=scaled).value == "on"
