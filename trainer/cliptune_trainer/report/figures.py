"""A job's report as numbers and names: what its journals tell of all its attempts.

Enters: the job's journals. Leaves: a mapping of JSON values, which becomes `report.json` and the page. Called
by `write`. What cannot be told (NaN) is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.message import Message

from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_trainer.data.dataset import Dataset, Pairs
from cliptune_trainer.job import JobFolder
from cliptune_trainer.spec import Spec

FORMAT: Final = 1
_CURVES: Final = ("loss", "learning_rate", "logit_scale", "gradient_norm", "samples_per_second")
# Of a curve; a page with every step of a long run would be slow to open.
_MOST_STEPS: Final = 400
_MOST_LABELS: Final = 1000


def figures_of(job: JobFolder, spec: Spec, dataset: Dataset, *, device_name: str) -> dict[str, Any]:
    """All that a report tells, less the pictures.

    Args:
        job: whose journals are read, preparation's among them.
        spec: of the job.
        dataset: what it trained and validated on.
        device_name: of the device, for a person.
    """
    events = list(_events(job))
    bodies = [event.event for event in events if event.HasField("event")]
    plan = next((body.plan for body in bodies if body.HasField("plan")), job_pb2.JobPlan())
    told: dict[str, Any] = _tellable(
        {
            "format": FORMAT,
            "job": {
                "id": job.job_id,
                "name": spec.name,
                "domain": spec.domain,
                "start": spec.model.name,
                "attempts": max((event.attempt for event in events), default=0),
            },
            "spec": _json(plan.spec),
            "decisions": [_json(made) for made in plan.decisions],
            "data": _data(dataset),
            "device": _device(plan, bodies, device_name),
            "time": _time(events, spec.resources.price_per_hour),
            "curves": _curves(bodies),
            "evaluations": [_json(body.evaluation) for body in bodies if body.HasField("evaluation")],
            "notices": [_json(body.notice) for body in bodies if body.HasField("notice")],
            "versions": {name: version(name) for name in ("cliptune", "torch", "open_clip_torch")},
        }
    )
    return told


def _events(job: JobFolder) -> Iterator[trainer_pb2.TrainerEvent]:
    """Of all attempts in their order; a line that a kill has torn is passed over."""
    for path in sorted(job.journal(0).parent.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json_format.Parse(line, trainer_pb2.TrainerEvent(), ignore_unknown_fields=True)
            except json_format.ParseError:
                continue


def _curves(bodies: Sequence[job_pb2.JobEvent]) -> dict[str, list[float]]:
    """By step; steps that were repeated after a resume are told once, as they went last."""
    steps = {body.progress.step: body.progress for body in bodies if body.HasField("progress")}
    names = sorted(steps)
    every = max(1, math.ceil(len(names) / _MOST_STEPS))
    kept = names[::every] if not names or names[-1] in names[::every] else [*names[::every], names[-1]]
    curves: dict[str, list[float]] = {"step": [float(step) for step in kept]}
    for name in _CURVES:
        curves[name] = [float(getattr(steps[step], name)) for step in kept]
    return curves


def _data(dataset: Dataset) -> dict[str, Any]:
    def split(pairs: Pairs) -> dict[str, int]:
        return {
            "rows": len(pairs),
            "images": len(set(pairs.image_ids.tolist())),
            "captions": len(set(pairs.caption_ids.tolist())),
        }

    counts = {
        name: Counter(label for pair in pairs.pairs for label in pair.labels)
        for name, pairs in (("train", dataset.train), ("validation", dataset.validation))
    }
    return {
        "train": split(dataset.train),
        "validation": split(dataset.validation),
        "labels": {
            label: {name: found[label] for name, found in counts.items()}
            for label in dataset.labels[:_MOST_LABELS]
        },
        "bad_rows": len(dataset.bad),
        "copies": dataset.copies,
        "leaks": list(dataset.leaks[:20]),
    }


def _device(plan: job_pb2.JobPlan, bodies: Sequence[job_pb2.JobEvent], name: str) -> dict[str, Any]:
    progress = [body.progress for body in bodies if body.HasField("progress")]
    return {
        "device": plan.device,
        "name": name,
        "precision": plan.precision,
        "parameters": plan.parameters,
        "batch_size": plan.batch_size,
        "micro_batch_size": progress[-1].micro_batch_size if progress else plan.micro_batch_size,
        "attention": plan.attention,
        "checkpointing": plan.checkpointing,
        "memory_budget_bytes": plan.memory_budget_bytes,
        "memory_bytes": max((one.device_memory_bytes for one in progress), default=0),
        "samples_per_second": progress[-1].samples_per_second if progress else math.nan,
    }


def _time(events: Sequence[trainer_pb2.TrainerEvent], price_per_hour: float | None) -> dict[str, Any]:
    """`device_s`: of each attempt from its first word to its last; waiting in a queue costs nothing."""
    now = datetime.now(UTC)
    spans: dict[int, tuple[datetime, datetime]] = {}
    for event in events:
        if event.attempt and event.HasField("time"):
            when = event.time.ToDatetime(tzinfo=UTC)
            first, _ = spans.get(event.attempt, (when, when))
            spans[event.attempt] = (first, when)
    if spans:
        last = max(spans)
        spans[last] = (spans[last][0], max(now, spans[last][1]))  # this one is not over yet
    device_s = sum((end - begin).total_seconds() for begin, end in spans.values())
    return {
        "started": min(begin for begin, _ in spans.values()).isoformat(timespec="seconds") if spans else None,
        "finished": now.isoformat(timespec="seconds"),
        "device_s": device_s,
        "price_per_hour": price_per_hour,
        "cost": None if price_per_hour is None else device_s / 3600 * price_per_hour,
    }


def _json(message: Message) -> dict[str, Any]:
    form: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=False
    )
    return form


def _tellable(value: Any) -> Any:
    """JSON knows no NaN and no infinity; protobuf's form of them is a text."""
    if isinstance(value, Mapping):
        return {name: _tellable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_tellable(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if value in ("NaN", "Infinity", "-Infinity") else value
