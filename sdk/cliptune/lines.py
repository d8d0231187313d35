"""Events as lines of text, for people who read a log and for the space above a progress bar."""

from __future__ import annotations

from cliptune.evaluation import Evaluation
from cliptune.evaluation_lines import evaluation_lines
from cliptune.job import (
    CheckpointSaved,
    CommandDone,
    JobEvent,
    JobPlan,
    LogLine,
    ModelPublished,
    Notice,
    Progress,
    StateChange,
    UnknownBody,
)
from cliptune.study import TrialDone, trial_lines


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
            return evaluation_lines(body)
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
        case TrialDone():
            return trial_lines(body)
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


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
