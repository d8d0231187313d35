"""A job's spec as it will run, and what its domain brought to it, for the plan.

Enters: the layered spec and the decisions. Leaves: a `JobSpec` with what was left open filled in, and
`Choice`s. Called by preparation.
"""

from __future__ import annotations

from google.protobuf import json_format
from google.protobuf.message import Message

from cliptune.domains import Layered
from cliptune.v1 import spec_pb2
from cliptune_model.choice import Choice
from cliptune_trainer.plan.decide import Decisions


def spec_as_run(layers: Layered, decisions: Decisions, *, precision: str) -> spec_pb2.JobSpec:
    """Every setting that a result depends on. How the step is split and computed on the device, which changes
    no result, is told by the plan's other fields."""
    spec = spec_pb2.JobSpec()
    spec.CopyFrom(layers.spec)
    spec.train.learning_rate = decisions.learning_rate
    spec.train.batch_size = decisions.batch_size
    spec.train.precision = precision
    spec.data.workers = decisions.workers
    spec.data.decode = "exact" if decisions.exact_decode else "fast"
    spec.resources.device = decisions.hardware.device.value
    spec.resources.threads = int(decisions.hardware.threads.value)
    spec.publish.model = spec.publish.model or spec.name
    del spec.evaluation.classes[:]
    spec.evaluation.classes.extend(
        spec_pb2.ClassPrompts(
            label=entry.label, prompts=entry.prompts, negative_prompts=entry.negative_prompts
        )
        for entry in decisions.classes
    )
    spec.evaluation.main_metric = decisions.main_metric
    return spec


def domain_choices(layers: Layered) -> list[Choice]:
    """What the domain's recipe set, each with its reason."""
    if layers.domain is None:
        return []
    return [
        Choice(
            subject=path,
            value=_told(layers.value(path)),
            reason=f"domain {layers.domain.name}: {layers.domain.reason(path)}",
        )
        for path in layers.from_domain()
    ]


def _told(value: object) -> str:
    if isinstance(value, Message):
        fields = json_format.MessageToDict(value, preserving_proto_field_name=True)
        return ", ".join(name if held is True else f"{name} {held:g}" for name, held in fields.items())
    if isinstance(value, str | int | float):
        return str(value)
    return ", ".join(map(repr, value)) if isinstance(value, list) else repr(value)
