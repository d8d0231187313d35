"""How often layers and patches are left out in training, as a share of what the model was made with.

Enters: a model, and the strength of a step's regularisation. Leaves: the same model, whose stochastic depth
and patch dropout are that much of their own. Called by the stepper: small images want less (EfficientNetV2:
Tan & Le 2021, section 4).
"""

from __future__ import annotations

from typing import Any

from open_clip.transformer import PatchDropout
from timm.layers.drop import DropPath
from torch import nn


class StochasticDepth:
    """What a model leaves out at random. Its own rates are those that it has when this is made."""

    def __init__(self, model: nn.Module) -> None:
        self._own: list[tuple[Any, str, float]] = [
            (module, name, float(getattr(module, name)))
            for module in model.modules()
            for kind, name in ((DropPath, "drop_prob"), (PatchDropout, "prob"))
            if isinstance(module, kind)
        ]
        self._strength = 1.0

    def scale(self, strength: float) -> None:
        """From here on it is so much of the model's own."""
        if strength == self._strength:
            return
        for module, name, own in self._own:
            setattr(module, name, own * strength)
        self._strength = strength
