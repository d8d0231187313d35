"""What is trained in place of the model's own weights: the spec's `[adapter]`, typed and checked."""

from __future__ import annotations

from typing import Final

from cliptune.v1 import spec_pb2
from cliptune_model.adapters.config import BOTTLENECK, KINDS, LORA, AdapterConfig
from cliptune_trainer.spec.check import one_of, wrong

NONE: Final = "none"
MERGED: Final = "merged"
ALONE: Final = "adapter"
# Zanella and Ben Ayed 2024, CLIP-LoRA, section 5, has rank 2, alpha 1 and dropout 0.25.
_RANK: Final = {LORA: 2, BOTTLENECK: 16}
_DROPOUT: Final = {LORA: 0.25, BOTTLENECK: 0.0}


def adapter_config(message: spec_pb2.AdapterSpec) -> AdapterConfig | None:
    """The typed form of an `AdapterSpec`; None: the model's own weights are trained. Raises `SpecError`."""
    kind = message.kind or NONE
    one_of("adapter.kind", kind, (NONE, *KINDS))
    if kind == NONE:
        return None
    if kind == BOTTLENECK and message.HasField("alpha"):
        raise wrong("adapter.alpha", f"{message.alpha:g}", "nothing: a bottleneck has none")
    rank = message.rank if message.HasField("rank") else _RANK[kind]
    return AdapterConfig(
        kind=kind,
        rank=rank,
        alpha=message.alpha if message.HasField("alpha") else rank / 2,
        dropout=message.dropout if message.HasField("dropout") else _DROPOUT[kind],
        targets=tuple(message.targets),
    )


def published_form(form: str, adapter: AdapterConfig | None) -> str:
    """The typed form of `publish.form`. Raises `SpecError`."""
    if form:
        one_of("publish.form", form, (MERGED, ALONE))
    if adapter is None:
        if form == ALONE:
            raise wrong("publish.form", repr(form), f"{MERGED}, as the job trains no adapter")
        return MERGED
    if not adapter.mergeable:
        if form == MERGED:
            raise wrong("publish.form", repr(form), f"{ALONE}: no weight can hold a bottleneck")
        return ALONE
    return form or MERGED
