"""Events as lines of text, for people who read a log and for the space above a progress bar."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cliptune.job import (
    CheckpointSaved,
    CommandDone,
    Evaluation,
    JobEvent,
    JobPlan,
    LogLine,
    ModelPublished,
    Notice,
    Progress,
    StateChange,
    UnknownBody,
)


def describe(event: JobEvent) -> list[str]:
    """The event in one line or a few; no line for one that says nothing to a person."""
    body = event.body
    match body:
        case StateChange():
            lines = [f"{body.state.lower()}: {body.reason}" if body.reason else body.state.lower()]
            if body.error is not None:
                lines.append(f"{type(body.error).__name__}: {body.error.message}")
            return lines
        case Progress():
            return [
                f"step {body.step}/{body.total_steps} epoch {body.epoch:.2f} loss {body.loss:.4f} "
                f"lr {body.learning_rate:.3e} scale {body.logit_scale:.2f} grad {body.gradient_norm:.3f} "
                f"{body.samples_per_second:.1f} samples/s eta {body.eta_seconds:.0f} s"
                + (f" skipped {body.skipped_steps}" if body.skipped_steps else "")
            ]
        case Evaluation():
            metrics = "  ".join(f"{name} {value}" for name, value in metric_rows(body.metrics))
            return [f"evaluation ({body.occasion}) at step {body.step}: {metrics}"]
        case CheckpointSaved():
            return [f"checkpoint at step {body.step}, {size(body.bytes)}"]
        case Notice():
            return [f"{'warning' if body.severity == 'warning' else 'note'}: {body.message}"]
        case LogLine():
            return [f"log: {body.message}"]
        case CommandDone():
            if body.error is not None:
                return [f"{body.command} failed: {body.error.message}"]
            return [f"{body.command} done"]
        case ModelPublished():
            aliases = "".join(f", {body.name}@{alias}" for alias in body.aliases)
            return [f"published {body.name}:{body.version}{aliases}"]
        case JobPlan():
            return plan_lines(body)
        case UnknownBody():
            return []


def plan_lines(plan: JobPlan) -> list[str]:
    """What a job will do, and the choices that were made for it."""
    seconds = f", about {plan.estimated_seconds:.0f} s" if plan.estimated_seconds else ""
    skipped = f", {plan.bad_rows} unreadable rows skipped" if plan.bad_rows else ""
    at_once = f" ({plan.micro_batch_size} at once)" if 0 < plan.micro_batch_size < plan.batch_size else ""
    return [
        f"plan: {plan.train_samples} training and {plan.validation_samples} validation samples, "
        f"{plan.distinct_captions} distinct captions{skipped}",
        f"plan: {plan.total_steps} steps of {plan.batch_size}{at_once} on {plan.device} in {plan.precision}, "
        f"{plan.parameters / 1e6:.1f} M parameters, {size(plan.estimated_memory_bytes)} of memory{seconds}",
        *(f"plan: {made.subject} = {made.choice}: {made.reason}" for made in plan.decisions),
    ]


def metric_rows(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Names and values as text, by name; "recall@5" before "recall@10"."""

    def order(name: str) -> list[tuple[str, int]]:
        return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D+)(\d*)", name)]

    return [(name, f"{metrics[name]:.4f}") for name in sorted(metrics, key=order)]


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
