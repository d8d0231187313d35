"""What a `Clip` knows of the adapter that it carries.

Enters: a configuration, the base, and layers that `layers` found. Leaves: `Attached`, which `attach` makes
and `files` writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from cliptune_model.adapters.config import LORA, AdapterConfig
from cliptune_model.adapters.hosts import Slices
from cliptune_model.adapters.identity import BaseIdentity


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer that can carry adapters.

    Attributes:
        name: of the module.
        targets: of `config.TARGETS`, in the order of its outputs.
        slices: of a fused projection that is one linear layer.
        ends: it gives the tower's width, so that a bottleneck may follow.
    """

    name: str
    targets: tuple[str, ...]
    slices: Slices
    ends: bool

    def wanted(self, config: AdapterConfig) -> tuple[str, ...]:
        """Those of its targets that the adapter is for."""
        asked = [one for one in self.targets if not config.targets or one in config.targets]
        if config.kind == LORA:
            return tuple(asked)
        return tuple(one for one in asked if one == "o" or (one == "mlp" and self.ends))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attached:
    """The adapter that a `Clip` carries.

    Attributes:
        config: of it.
        base: the model without it.
        layers: those that carry it.
    """

    config: AdapterConfig
    base: BaseIdentity
    layers: tuple[Layer, ...]
