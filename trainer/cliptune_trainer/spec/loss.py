"""What to minimise: the spec's `[loss]`, typed and checked."""

from __future__ import annotations

from cliptune.v1 import spec_pb2
from cliptune_trainer.losses.config import LossConfig, Term
from cliptune_trainer.spec.check import wrong


def loss_config(loss: spec_pb2.LossSpec) -> LossConfig:
    """The typed form of `LossSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    if loss.terms and (loss.name or loss.parameters):
        field = "name" if loss.name else "parameters"
        value = repr(loss.name) if loss.name else f"{dict(loss.parameters)}"
        raise wrong(f"loss.{field}", f"{value} beside loss.terms", "one of the two")
    terms = tuple(
        Term(
            name=term.name,
            weight=term.weight if term.HasField("weight") else 1.0,
            parameters=dict(term.parameters),
            path=f"loss.terms[{place}]",
        )
        for place, term in enumerate(loss.terms)
    )
    return LossConfig(
        terms=terms or (Term(name=loss.name or "infonce", parameters=dict(loss.parameters)),),
        tiling=loss.tiling or "auto",
        weighting=loss.weighting or "fixed",
        temperature=loss.temperature or "learned",
        logit_scale=loss.logit_scale if loss.HasField("logit_scale") else None,
        max_logit_scale=loss.max_logit_scale if loss.HasField("max_logit_scale") else 100.0,
        matryoshka_dims=tuple(loss.matryoshka_dims),
    )
