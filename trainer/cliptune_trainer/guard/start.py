"""The weights that training started from, to measure the way from them, to go back on it, and to be drawn to.

Enters: the model before its first step. Leaves: `start.safetensors` in the job's folder, which a resumed run
reads; models in between; the pull of L2-SP. Called by `guard`. Only what training can change is kept: of an
adapter's run, the adapter.

An adapter begins as nothing, for its last matrix is zero. In its runs that matrix alone is taken a share of
the way, and drawn back: what the adapter adds goes with it in proportion, so that the model in between is the
one whose merged weights lie there, and the pull that of L2-SP on merged weights. Shares of both matrices
would be a share of the way by its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cliptune.durable import sync
from cliptune_model.adapters import is_inner
from cliptune_model.clip import Clip
from cliptune_trainer.steps.optim import takes_decay

_SIMILARITY: Final = "similarity."


def changing(clip: Clip) -> dict[str, Tensor]:
    """What training changes, by name, as it is in the model: trained weights, and statistics of floats."""
    found: dict[str, Tensor] = {}
    # A buffer that no checkpoint holds is computed, such as the mask of causal attention.
    for prefix, module in (("", clip.model), (_SIMILARITY, clip.similarity)):
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                found[prefix + name] = weight.detach()
        kept = module.state_dict(keep_vars=True).keys()
        for name, buffer in module.named_buffers():
            if name in kept and buffer.is_floating_point():
                found[prefix + name] = buffer
    return found


@contextmanager
def put_in(clip: Clip, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights, in place; with its own again afterwards, whatever happens."""
    held = changing(clip)
    own = {name: held[name].clone() for name in weights}
    try:
        _copy(held, weights)
        yield
    finally:
        _copy(held, own)


class StartingWeights:
    """What training changes, as it was before the first step; on the CPU."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)

    @classmethod
    def read(cls, path: Path) -> StartingWeights | None:
        """Of a run that goes on; None: the file is gone or damaged."""
        try:
            return cls(load_file(path))
        except (OSError, SafetensorError):
            return None

    @classmethod
    def keep(cls, clip: Clip, path: Path) -> StartingWeights:
        """Of a run that begins: taken from the model, and written.

        Raises:
            OSError, SafetensorError: the disk has no room.
        """
        weights = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in changing(clip).items()}
        partial = path.with_name(f".partial-{path.name}")
        save_file(weights, partial)
        sync(partial)
        partial.replace(path)
        return cls(weights)

    def whole(self) -> dict[str, Tensor]:
        """The weights themselves, by name."""
        return dict(self._weights)

    def between(self, trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Weights at a share of the way from these to the trained ones, on the trained ones' device; the ends
        are exact (WiSE-FT: Wortsman et al. 2022, equation 1)."""
        if share == 1.0:
            return dict(trained)
        if share == 0.0:
            return self.whole()
        return {
            name: tensor
            if is_inner(name)
            else torch.lerp(self._weights[name].to(tensor.device), tensor, share)
            for name, tensor in trained.items()
        }

    def pull(self, clip: Clip) -> Pull:
        """Towards these weights, for L2-SP."""
        drawn = [
            (weight.detach(), self._weights[name].to(weight.device))
            for name, weight in clip.model.named_parameters()
            if weight.requires_grad and takes_decay(name, weight) and not is_inner(name)
        ]
        return Pull([weight for weight, _ in drawn], [start for _, start in drawn])


class Pull:
    """L2-SP (Li et al. 2018, section 3.2), decoupled from Adam's moments as AdamW's decay is (Loshchilov and
    Hutter 2019). Takes the memory of the weights that it draws."""

    def __init__(self, weights: list[Tensor], start: list[Tensor]) -> None:
        self._weights, self._start = weights, start

    @torch.no_grad()
    def __call__(self, share: float) -> None:
        """Draws each weight by this share of its way; waits for no device."""
        torch._foreach_lerp_(self._weights, self._start, share)


@torch.no_grad()
def _copy(held: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        held[name].copy_(tensor)
