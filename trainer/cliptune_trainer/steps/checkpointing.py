"""Activation checkpointing: a block of a tower keeps its input alone; the backward pass computes it again.

Enters: a `Clip`. Leaves: the same, its blocks wrapped. Called by whoever settles the batch plan.

Chen et al. 2016. The blocks are wrapped here, not by the libraries' own switches, for two reasons: libraries
differ in what they checkpoint (open_clip's ResNets nothing), and torch's checkpoint forgets the generator of
Apple's GPU (pytorch pull request 194478): dropout would draw another mask in the second computation, and the
gradients would be silently wrong. Here the generator is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cliptune_model.clip import Clip
from cliptune_trainer.steps.replay import RandomState

_MARK: Final = "_cliptune_uncheckpointed"


def enable_checkpointing(clip: Clip) -> int:
    """Wraps the blocks of both towers. Returns how many are wrapped; again: changes nothing.

    Without gradients (evaluation, the first pass of accumulation) a wrapped block runs as it ever did.
    """
    blocks = list(repeated_blocks(clip.model))
    for block in blocks:
        if not hasattr(block, _MARK):
            setattr(block, _MARK, block.forward)
            block.forward = Checkpointed(block.forward, clip.device)
    return len(blocks)


def disable_checkpointing(clip: Clip) -> None:
    """Inverse of `enable_checkpointing`."""
    for module in clip.model.modules():
        if hasattr(module, _MARK):
            module.forward = getattr(module, _MARK)
            delattr(module, _MARK)


def is_checkpointed(block: nn.Module) -> bool:
    """Whether `enable_checkpointing` wrapped it."""
    return hasattr(block, _MARK)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that a tower is a stack of, whichever library wrote it.

    A stack is a `ModuleList` or `Sequential` of modules of one class that have parts and parameters of their
    own. Of stacks within stacks (the stages of a convolutional tower) the inner ones count.
    """
    for child in model.children():
        inner = list(repeated_blocks(child))
        if inner:
            yield from inner
        elif _is_stack(child):
            yield from child.children()


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    kinds = {type(child) for child in module}
    # A stack of plain layers has nothing to save: its inputs are all that it keeps.
    composed = all(next(child.children(), None) is not None for child in module)
    return len(kinds) == 1 and composed and next(module.parameters(), None) is not None


class Checkpointed:
    """A forward pass whose activations are computed again when the backward pass needs them.

    A class, not a closure: a copy of the model copies it too, and computes with its own weights.
    """

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        self._forward = forward
        self._on_mps = device.type == "mps"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own `forward`."""
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if self._on_mps:
            return checkpoint(self._forward, *args, use_reentrant=False, context_fn=_mps_contexts, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


def _mps_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first computation, nothing; for the second, the generators as they are now."""
    return nullcontext(), RandomState.capture(torch.device("mps")).replayed()
