"""Convolutional image towers for inference on the CPU: batch norms folded into the convolutions before them.

Enters: a `Clip`. Leaves: another whose image tower computes the same to rounding with fewer passes over
memory, or the same `Clip`, and the choice with its reason. Called by the engine when it has loaded a model,
by evaluation, and by benchmarks. Never for training steps: a folded tower has nothing to train or to export.

Which norm follows which convolution is seen, not guessed: one image goes through the tower, and a norm is
folded where it was given the very tensor that a convolution made. Then the folded tower must answer as the
first one does, or it is not used.

Shape suffixes: B batch, C channels, H height, W width, D embedding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from cliptune_model.acceleration.folded_blocks import FoldedConvolution, InParts
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip

TOLERANCE: Final = 1e-4  # of a vector's length
# Maps beyond this are fresh pages of the kernel's each time (glibc keeps up to 32 MiB), and leave the caches.
_PART_BYTES: Final = 24 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """A convolution and the norm that alone reads it, by their names in the tower."""

    convolution: str
    norm: str
    input_BCHW: torch.Size


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What one pass through a tower showed."""

    calls: Counter[str] = field(default_factory=Counter)
    # By identity; the tensors are kept so that no other gets theirs.
    made: dict[int, tuple[str, torch.Size, Tensor]] = field(default_factory=dict)
    pairs: list[_Pair] = field(default_factory=list)
    largest_bytes: int = 0


def fold(clip: Clip) -> tuple[Clip, Choice]:
    """A `Clip` for inference with a folded image tower, where that applies; `clip` itself is left as it is.

    Args:
        clip: in evaluation mode. The result shares its text tower and similarity.
    """
    if clip.device.type != "cpu":
        return clip, _off("proved on the CPU alone")
    tower = cast(nn.Module, clip.model.visual)
    if not any(isinstance(module, nn.BatchNorm2d) for module in tower.modules()):
        return clip, _off("the image tower has no batch norm")
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randn(1, 3, *clip.image_size, generator=generator)
    reason = ""
    with torch.no_grad():
        tower = copy.deepcopy(tower).eval()
        wanted = tower(image_BCHW)
        if not isinstance(wanted, Tensor) or wanted.dtype != torch.float32:
            return clip, _off("the image tower does not answer with one fp32 vector an image")
        seen = _look(tower, image_BCHW)
        pairs = [pair for pair in seen.pairs if _foldable(tower, pair, seen)]
        if not pairs:
            return clip, _off("no batch norm directly follows a convolution")
        for fused in (True, False):
            try:
                folded = _folded(tower, pairs, max(1, _PART_BYTES // seen.largest_bytes), fused=fused)
                found = folded(image_BCHW)
            except (RuntimeError, AttributeError, TypeError) as error:  # this torch lacks the kernels
                reason = f"{type(error).__name__}: {error}"
                continue
            apart = float((found - wanted).norm() / wanted.norm())
            if apart <= TOLERANCE:
                kernels = "oneDNN's kernels with the activation in them" if fused else "torch's convolutions"
                told = f"{len(pairs)} batch norms in the convolutions before them; {kernels}, channels last"
                choice = Choice(subject="folded_towers", value="on", reason=told)
                return dataclasses.replace(clip, model=_with_visual(clip.model, folded)), choice
            reason = f"the folded tower's vector is {apart:.1e} of its length away"
    return clip, _off(reason)


def _look(tower: nn.Module, image_BCHW: Tensor) -> _Seen:
    seen = _Seen()

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.calls[name] += 1
            if isinstance(module, nn.Conv2d):
                seen.made[id(output)] = (name, inputs[0].shape, output)
                seen.largest_bytes = max(seen.largest_bytes, output.nbytes // len(output))
            elif (before := seen.made.get(id(inputs[0]))) is not None:
                seen.pairs.append(_Pair(convolution=before[0], norm=name, input_BCHW=before[1]))

        return module.register_forward_hook(hook)

    watched = [
        watch(name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        tower(image_BCHW)
    finally:
        for handle in watched:
            handle.remove()
    return seen


def _foldable(tower: nn.Module, pair: _Pair, seen: _Seen) -> bool:
    """Of the classes that folding is written for, each called once, and one norm for one convolution."""
    convolution = cast(nn.Conv2d, tower.get_submodule(pair.convolution))
    norm = cast(nn.BatchNorm2d, tower.get_submodule(pair.norm))
    readers = sum(other.convolution == pair.convolution for other in seen.pairs)
    return (
        type(convolution) in (nn.Conv2d, Conv2dSame)
        and type(norm) in (nn.BatchNorm2d, BatchNormAct2d)
        and norm.running_mean is not None
        and seen.calls[pair.convolution] == seen.calls[pair.norm] == readers == 1
        and FoldedConvolution.takes(convolution, pair.input_BCHW)
    )


def _folded(tower: nn.Module, pairs: list[_Pair], rows: int, *, fused: bool) -> InParts:
    tower = copy.deepcopy(tower)
    for pair in pairs:
        convolution = cast(nn.Conv2d, tower.get_submodule(pair.convolution))
        norm = cast(nn.BatchNorm2d, tower.get_submodule(pair.norm))
        activation = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded = FoldedConvolution(convolution, norm, activation, pair.input_BCHW, rows=rows, fused=fused)
        tower.set_submodule(pair.convolution, folded)
        tower.set_submodule(pair.norm, nn.Identity() if folded.activates else activation)
    return InParts(tower.to(memory_format=torch.channels_last), rows)


def _with_visual(model: nn.Module, visual: nn.Module) -> nn.Module:
    """A model that shares everything with `model` but its image tower."""
    other = copy.copy(model)
    other._modules = {**model._modules, "visual": visual}
    return other


def _off(reason: str) -> Choice:
    return Choice(subject="folded_towers", value="off", reason=reason)
