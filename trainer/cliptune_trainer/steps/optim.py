"""AdamW with the groups that CLIP needs.

Enters: a model and its learning rate. Leaves: an optimizer, and its state as named tensors for checkpoints.
Called by the loop and the step. Biases, norms, class and position embeddings and the logit scale take no
weight decay; the logit scale and bias have a group, and so a learning rate, of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import AdamW

from cliptune_model.machine.hardware import host
from cliptune_model.machine.rules import choose_fused_optimizer
from cliptune_trainer.steps.depth import layer_shares

# As open_clip trains its ViTs.
BETAS: Final = (0.9, 0.98)
EPS: Final = 1e-6
_FUSING: Final = ("cpu", "cuda", "mps")
_SCALES: Final = ("logit_scale", "logit_bias")
# Parts of a name that say "position", "class token" or "scale", in open_clip, timm and Hugging Face.
_NO_DECAY: Final = frozenset(
    {
        "class_embedding",
        "positional_embedding",
        "cls_token",
        "reg_token",
        "pos_embed",
        "cls_emb",
        "position_embeddings",
        "relative_position_bias_table",
        "head_scale",
        *_SCALES,
    }
)
# Key of a group: by what its learning rate is multiplied.
_SHARE: Final = "learning_rate_share"


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    scaled: bool = False,
    fused: bool | None = None,
    scale_share: float = 1.0,
    beside: Mapping[str, nn.Module] | None = None,
    layer_decay: float = 1.0,
) -> AdamW:
    """AdamW over all trainable parameters, in up to three groups: with decay, without, scales.

    With `layer_decay` the first two are groups of their own for each layer.

    The last are logit scale and bias, and whatever is trained beside the towers.

    Args:
        model: fp32 master weights, on their device.
        learning_rate: of the first step.
        weight_decay: of matrices.
        scaled: a gradient scaler is in use.
        fused: by the policy; None: wherever nothing is known against it.
        scale_share: learning rate of the scales, as a multiple of the others'.
        beside: what else is trained (the similarity, the objective); its parameters are named KEY.NAME.
        layer_decay: a layer's learning rate, as a multiple of the one's above it.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = [entry for entry in trainable if entry[0] in _SCALES]
    for key, module in (beside or {}).items():
        scales += [(f"{key}.{name}", one) for name, one in module.named_parameters() if one.requires_grad]
    decayed = [entry for entry in trainable if takes_decay(*entry)]
    others = [entry for entry in trainable if entry[0] not in _SCALES and not takes_decay(*entry)]
    shares = {} if layer_decay == 1.0 else layer_shares(model, layer_decay)
    rates = sorted({shares.get(name, 1.0) for name, _ in (*decayed, *others)}, reverse=True)
    groups: list[dict[str, Any]] = [
        {
            "params": [entry for entry in entries if shares.get(entry[0], 1.0) == rate],
            "weight_decay": decay,
            _SHARE: rate,
        }
        for entries, decay in ((decayed, weight_decay), (others, 0.0))
        for rate in rates
    ]
    groups.append({"params": scales, "weight_decay": 0.0, _SHARE: scale_share})
    device = next(model.parameters()).device.type
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=BETAS,
        eps=EPS,
        fused=_can_fuse(device, scaled) if fused is None else fused,
    )
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def set_learning_rate(optimizer: AdamW, learning_rate: float) -> None:
    """Of the next step; the scales' in their proportion to it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[_SHARE]


def takes_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter."""
    return parameter.ndim > 1 and _NO_DECAY.isdisjoint(name.split("."))


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
