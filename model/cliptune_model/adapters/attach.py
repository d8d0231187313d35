"""Adapters put into a model, and the weights that come of them.

Enters: a `Clip` and an `AdapterConfig`. Leaves: the same model, whose layers carry additions, nothing else
of which is trained but the logit scale. Called by the trainer before anything is planned, and by `files`,
which puts a trained adapter over its base. What is merged is computed in fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from cliptune.errors import ConflictError, SpecError
from cliptune_model.adapters.attached import Attached, Layer
from cliptune_model.adapters.config import TARGETS, AdapterConfig
from cliptune_model.adapters.hosts import (
    HOSTS,
    AdaptedAttention,
    AdaptedLinear,
    AdaptedPointwise,
    Slices,
    is_host,
)
from cliptune_model.adapters.identity import BaseIdentity
from cliptune_model.adapters.layers import find_layers, is_image_layer
from cliptune_model.adapters.paths import LowRank, path_for
from cliptune_model.attention import uninstall
from cliptune_model.clip import Clip

# Trained beside every adapter, and kept in its file.
SCALES: Final = ("logit_scale", "logit_bias")
_PART: Final = ".adapter."


def attach(
    clip: Clip, config: AdapterConfig, base: BaseIdentity, *, image: bool = True, text: bool = True
) -> Clip:
    """A new adapter in `clip`'s model, in place; returns the `Clip` that knows of it.

    Afterwards the adapter, the logit scale and the logit bias are all that is trained of the model. The first
    matrices are drawn from torch's CPU generator.

    Args:
        clip: without an adapter; before attention, checkpointing or compilation are installed.
        config: of the adapter.
        base: of `clip` as it is.
        image: the image tower gets one.
        text: the text tower gets one.

    Raises:
        ConflictError: the model has an adapter already.
        SpecError: it has no layers of a kind that was asked for.
    """
    if clip.adapter is not None:
        raise ConflictError(
            f"{clip.architecture} carries an adapter already: merge it first, or leave it out"
        )
    chosen = [layer for layer in find_layers(clip) if (image if is_image_layer(layer.name) else text)]
    found = {target for layer in chosen for target in layer.wanted(replace(config, targets=()))}
    missing = [target for target in config.targets if target not in found]
    if missing or not found:
        has = ", ".join(target for target in TARGETS if target in found) or "none"
        wanted = ", ".join(missing) or "any that an adapter is for"
        raise SpecError(
            f"adapter.targets: {clip.architecture} has no layers {wanted}; it has: {has}",
            path="adapter.targets",
            allowed=has,
        )
    layers = tuple(layer for layer in chosen if layer.wanted(config))
    put_in(clip.model, layers, config)
    clip.model.requires_grad_(False)
    for name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(_PART in f".{name}" or name in SCALES)
    return replace(clip, adapter=Attached(config=config, base=base, layers=layers))


def put_in(model: nn.Module, layers: tuple[Layer, ...], config: AdapterConfig) -> None:
    """Gives the layers of these names their additions."""
    for layer in layers:
        module: Any = model.get_submodule(layer.name)
        paths = {target: _path(module, layer, target, config) for target in layer.wanted(config)}
        module.__class__ = HOSTS[type(module)]
        module.adapter = nn.ModuleDict(paths)
        module.adapter.train(module.training)
        if isinstance(module, AdaptedLinear):
            module.slices = dict(layer.slices)


def take_out(model: nn.Module) -> None:
    """Inverse of `put_in`: the model without its additions, which are lost, and without a plan of its
    attention."""
    uninstall(model)
    own = {host: kind for kind, host in reversed(HOSTS.items())}
    for module in list(model.modules()):
        if is_host(module):
            del module.adapter
            module.__dict__.pop("slices", None)
            module.__class__ = own[type(module)]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's file holds: its own weights and the scales, by their names in the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if _PART in f".{name}" or name in SCALES
    }


def is_inner(name: str) -> bool:
    """Whether a weight of this name lies within an addition, before its last matrix.

    An addition is linear in the others: to multiply them by a share multiplies what it adds by it, and so the
    difference of the merged weights from the base.
    """
    return _PART in f".{name}" and name.rpartition(".")[2].startswith("down")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model as it would be without an adapter, scales aside."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if _PART not in f".{name}" and name not in SCALES
    }


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the plain model that computes the same: the adapter is in the weights.

    A model without one: its state as it is.

    Raises:
        ConflictError: the adapter is a bottleneck, which no weight can hold.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if _PART not in f".{name}"}
    for name, parts in _deltas(model):
        whole = state[name].detach().to("cpu", torch.float64, copy=True)
        for rows, delta in parts:
            whole[rows] += delta.view(whole[rows].shape)
        state[name] = whole.to(state[name])
    return state


def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts trained tensors in; new parameters, so that a base that shares its weights keeps its own."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent) if parent else model
        held = getattr(module, leaf, None)
        like = next(model.parameters()) if held is None else held
        setattr(module, leaf, nn.Parameter(tensor.to(like.device, like.dtype)))


def _path(module: Any, layer: Layer, target: str, config: AdapterConfig) -> nn.Module:
    if isinstance(module, nn.MultiheadAttention):
        inputs = {"k": module.kdim, "v": module.vdim}.get(target, module.embed_dim)
        return path_for(config, cast(int, inputs), module.embed_dim, module.out_proj.weight)
    if isinstance(module, nn.Conv2d):
        return path_for(config, module.in_channels, module.out_channels, module.weight, module.stride)
    first, last = layer.slices.get(target, (0, module.out_features))
    return path_for(config, module.in_features, last - first, module.weight)


def _deltas(model: nn.Module) -> Iterator[tuple[str, list[tuple[slice, Tensor]]]]:
    """Name of a weight, and what is added to which of its rows."""
    for prefix, module in model.named_modules():
        if not is_host(module):
            continue
        paths = dict(cast(nn.ModuleDict, module.adapter).items())
        for path in paths.values():
            if not isinstance(path, LowRank):
                raise ConflictError(
                    "a bottleneck adapter is not linear: no weight can hold it, so it is served over its base"
                )
        deltas = {target: cast(LowRank, path).weight().cpu() for target, path in paths.items()}
        if isinstance(module, AdaptedAttention):
            yield from _of_attention(module, prefix, deltas)
        elif isinstance(module, AdaptedLinear) and module.slices:
            slices: Slices = module.slices
            yield f"{prefix}.weight", [(slice(*slices[one]), delta) for one, delta in deltas.items()]
        elif isinstance(module, AdaptedLinear | AdaptedPointwise):
            yield f"{prefix}.weight", [(slice(None), delta) for delta in deltas.values()]


def _of_attention(
    module: Any, prefix: str, deltas: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[tuple[slice, Tensor]]]]:
    width = module.embed_dim
    if module.in_proj_weight is not None:
        places = {one: slice(place * width, (place + 1) * width) for place, one in enumerate("qkv")}
        yield f"{prefix}.in_proj_weight", [(places[one], deltas[one]) for one in "qkv" if one in deltas]
    else:
        yield from (
            (f"{prefix}.{one}_proj_weight", [(slice(None), deltas[one])]) for one in "qkv" if one in deltas
        )
    if "o" in deltas:
        yield f"{prefix}.out_proj.weight", [(slice(None), deltas["o"])]
