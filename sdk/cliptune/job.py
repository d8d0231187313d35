"""A training job and its events as the user sees them: frozen dataclasses over the messages of `job.proto`.

Made by `codec.py`, handed out by both clients. What happened stands in `JobEvent.body`, made for `match`:

    match event.body:
        case Progress(step=step, loss=loss): ...
        case StateChange(state=JobState.FAILED, error=error): ...

Each view keeps the message it was made from in `message`, for its JSON form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from cliptune.errors import CliptuneError, from_detail
from cliptune.evaluation import Evaluation, evaluation_from_message
from cliptune.study import TrialDone, trial_from_message
from cliptune.v1 import error_pb2, job_pb2, spec_pb2


class JobState(StrEnum):
    """Where a job stands."""

    PREPARING = "PREPARING"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    """A state of a newer daemon."""

    @property
    def final(self) -> bool:
        """Whether nothing follows."""
        return self in _FINAL


_FINAL: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
_STATES: Final[dict[int, JobState]] = {
    job_pb2.JOB_STATE_PREPARING: JobState.PREPARING,
    job_pb2.JOB_STATE_QUEUED: JobState.QUEUED,
    job_pb2.JOB_STATE_RUNNING: JobState.RUNNING,
    job_pb2.JOB_STATE_PAUSED: JobState.PAUSED,
    job_pb2.JOB_STATE_SUCCEEDED: JobState.SUCCEEDED,
    job_pb2.JOB_STATE_FAILED: JobState.FAILED,
    job_pb2.JOB_STATE_CANCELLED: JobState.CANCELLED,
}
STATE_NUMBERS: Final = {state: job_pb2.JobState.Value(f"JOB_STATE_{state}") for state in _STATES.values()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """An automatic choice and why it was made."""

    subject: str
    choice: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """What preparing found out: sizes, memory, time."""

    device: str
    precision: str
    train_samples: int
    validation_samples: int
    distinct_captions: int
    labels: tuple[str, ...]
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    parameters: int
    estimated_memory_bytes: int
    estimated_seconds: float
    """0: unknown."""
    bad_rows: int
    micro_batch_size: int
    """Pairs that go through the towers at once. 0: settled when the run starts."""
    attention: str
    checkpointing: bool
    memory_budget_bytes: int
    """What the step may use on the device. 0: not told."""
    decisions: tuple[Decision, ...]
    spec: spec_pb2.JobSpec = field(repr=False)
    """The whole spec as it will run: defaults, domain recipe and what was asked for, one over the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateChange:
    """The job entered a state."""

    state: JobState
    reason: str
    error: CliptuneError | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """After a step of the optimiser."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    logit_scale: float
    gradient_norm: float
    samples_per_second: float
    device_memory_bytes: int
    eta_seconds: float
    micro_batch_size: int
    loss_scale: float
    """What fp16 multiplies the loss by. 0: not scaled."""
    skipped_steps: int
    """So far: their gradients were not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """The job can go on from here."""

    step: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """Something the user should know. `severity`: "info" or "warning"; `code`: a short stable name."""

    severity: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """A line of the trainer's log."""

    level: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandDone:
    """A command was carried out, or failed with `error`."""

    command_id: str
    command: str
    error: CliptuneError | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPublished:
    """The trained model is in the registry."""

    name: str
    version: int
    aliases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnknownBody:
    """A kind of event that a newer daemon sends; its content is in the event's `message`."""


EventBody = (
    StateChange
    | Progress
    | Evaluation
    | CheckpointSaved
    | Notice
    | LogLine
    | CommandDone
    | ModelPublished
    | JobPlan
    | TrialDone
    | UnknownBody
)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvent:
    """Something that happened to a job. Events of one job are numbered from 1 without a gap."""

    job_id: str
    number: int
    time: datetime
    attempt: int
    """The trainer's launch that caused it; 0 for the daemon's own events and for preparation."""
    body: EventBody
    message: job_pb2.JobEvent = field(repr=False, compare=False)

    @property
    def final(self) -> bool:
        """Whether it is the job's last."""
        return isinstance(self.body, StateChange) and self.body.state.final


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A fine-tuning job as the daemon knew it when it answered."""

    id: str
    name: str
    state: JobState
    state_reason: str
    error: CliptuneError | None
    created: datetime | None
    started: datetime | None
    finished: datetime | None
    attempt: int
    last_event_number: int
    progress: Progress | None
    evaluation: Evaluation | None
    plan: JobPlan | None
    model: str
    """Published model, "NAME:VERSION". Empty until then."""
    queue_position: int
    """1 is next. 0: not queued."""
    trials: tuple[TrialDone, ...]
    """Of a study: those that have ended, in the order of their ends."""
    spec: spec_pb2.JobSpec = field(repr=False)
    message: job_pb2.Job = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandReceipt:
    """A command was carried out. `event_number` is the event that says so, `job` the job after it."""

    command_id: str
    event_number: int
    job: Job


def job_from_message(message: job_pb2.Job) -> Job:
    """The view of a `Job`."""
    return Job(
        id=message.id,
        name=message.spec.name,
        state=_STATES.get(message.state, JobState.UNKNOWN),
        state_reason=message.state_reason,
        error=_error(message, message.error),
        created=_time(message, "created"),
        started=_time(message, "started"),
        finished=_time(message, "finished"),
        attempt=message.attempt,
        last_event_number=message.last_event_number,
        progress=_progress(message.progress) if message.HasField("progress") else None,
        evaluation=evaluation_from_message(message.evaluation) if message.HasField("evaluation") else None,
        plan=_plan(message.plan) if message.HasField("plan") else None,
        model=message.model,
        queue_position=message.queue_position,
        trials=tuple(trial_from_message(trial) for trial in message.trials),
        spec=message.spec,
        message=message,
    )


def event_from_message(message: job_pb2.JobEvent) -> JobEvent:
    """The view of a `JobEvent`."""
    return JobEvent(
        job_id=message.job_id,
        number=message.number,
        time=_time(message, "time") or datetime.fromtimestamp(0, UTC),
        attempt=message.attempt,
        body=_body(message),
        message=message,
    )


def _body(event: job_pb2.JobEvent) -> EventBody:
    match event.WhichOneof("body"):
        case "state":
            change = event.state
            state = _STATES.get(change.state, JobState.UNKNOWN)
            return StateChange(state=state, reason=change.reason, error=_error(change, change.error))
        case "progress":
            return _progress(event.progress)
        case "evaluation":
            return evaluation_from_message(event.evaluation)
        case "checkpoint":
            return CheckpointSaved(step=event.checkpoint.step, bytes=event.checkpoint.bytes)
        case "notice":
            severity = "warning" if event.notice.severity == job_pb2.SEVERITY_WARNING else "info"
            return Notice(severity=severity, code=event.notice.code, message=event.notice.message)
        case "log":
            return LogLine(level=event.log.level, message=event.log.message)
        case "command":
            done = event.command
            return CommandDone(
                command_id=done.command_id, command=done.command, error=_error(done, done.error)
            )
        case "published":
            made = event.published
            return ModelPublished(name=made.name, version=made.version, aliases=tuple(made.aliases))
        case "plan":
            return _plan(event.plan)
        case "trial":
            return trial_from_message(event.trial)
        case _:
            return UnknownBody()


def _progress(message: job_pb2.Progress) -> Progress:
    return Progress(**{name: getattr(message, name) for name in Progress.__slots__})


def _plan(message: job_pb2.JobPlan) -> JobPlan:
    plain = {
        name: getattr(message, name) for name in JobPlan.__slots__ if name not in ("labels", "decisions")
    }
    decisions = tuple(
        Decision(subject=made.subject, choice=made.choice, reason=made.reason) for made in message.decisions
    )
    return JobPlan(**plain, labels=tuple(message.labels), decisions=decisions)


def _error(owner: Any, detail: error_pb2.ErrorDetail) -> CliptuneError | None:
    return from_detail(detail) if owner.HasField("error") else None


def _time(owner: Any, name: str) -> datetime | None:
    if not owner.HasField(name):
        return None
    stamp: Timestamp = getattr(owner, name)
    return stamp.ToDatetime(tzinfo=UTC)
