"""Adapters: small trained additions to a model whose own weights stay as they are.

Enters: a `Clip` and an `AdapterConfig`, or an adapter's folder. Leaves: a `Clip` that carries the adapter,
the adapter's files, or a model with the adapter in its weights. Called by the trainer, by export and load, by
the engine, and by the command `cliptune adapters`.
"""

from cliptune_model.adapters.attach import attach, base_state, is_inner, merged_state
from cliptune_model.adapters.attached import Attached
from cliptune_model.adapters.config import (
    BOTTLENECK,
    BOTTLENECK_TARGETS,
    KINDS,
    LORA,
    TARGETS,
    AdapterConfig,
)
from cliptune_model.adapters.files import (
    INSIDE,
    describe_adapter,
    holds_adapter,
    load_adapted,
    write_adapter,
)
from cliptune_model.adapters.identity import BaseIdentity, digest
from cliptune_model.adapters.sharing import SharedBase

__all__ = [
    "BOTTLENECK",
    "BOTTLENECK_TARGETS",
    "INSIDE",
    "KINDS",
    "LORA",
    "TARGETS",
    "AdapterConfig",
    "Attached",
    "BaseIdentity",
    "SharedBase",
    "attach",
    "base_state",
    "describe_adapter",
    "digest",
    "holds_adapter",
    "is_inner",
    "load_adapted",
    "merged_state",
    "write_adapter",
]
