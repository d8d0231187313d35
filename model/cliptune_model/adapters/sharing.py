"""One base, many adapters: copies of a model that share its weights.

Enters: a `Clip`. Leaves: a `Clip` with modules of its own and the same tensors, so that each can carry
another adapter at the price of the adapter alone. Called by `files` and, through it, by the engine.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Final

from cliptune_model.adapters.attach import base_state, take_out
from cliptune_model.adapters.identity import digest
from cliptune_model.clip import Clip


class SharedBase:
    """The weights of a loaded model, for adapters that belong to it.

    Make it before the model is used: a forward may change modules for its own time.

    Args:
        clip: with or without an adapter, which the copies have not.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip: Final = shared_copy(clip)
        self._sha256 = "" if clip.adapter is None else clip.adapter.base.sha256

    @property
    def sha256(self) -> str:
        """Of its weights; computed when it is first asked for."""
        if not self._sha256:
            self._sha256 = digest(base_state(self._clip.model))
        return self._sha256

    def copy(self) -> Clip:
        """A model without an adapter, its weights shared."""
        return shared_copy(self._clip)


def shared_copy(clip: Clip) -> Clip:
    """A copy without adapter and without a plan of attention: other modules, the same tensors."""
    memo = {id(tensor): tensor for tensor in (*clip.model.parameters(), *clip.model.buffers())}
    model = deepcopy(clip.model, memo)
    take_out(model)
    return replace(clip, model=model, adapter=None)
