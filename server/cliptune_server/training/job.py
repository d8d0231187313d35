"""One job's state machine, pure: what each event changes, which command a state allows, what an ending means.

Enters: events, commands, the way a trainer process ended. Leaves: the `Job` message they add up to, an
error for a command out of place, the state that follows. Called by `live_job.py` and `jobs.py`; touches no
file, clock or process, so that the same events give the same job after every restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from google.protobuf import timestamp_pb2

from cliptune.errors import InternalError, InvalidInputError, JobStateError, to_detail
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import error_pb2, job_pb2
from cliptune.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_PREPARING,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    JOB_STATE_UNSPECIFIED,
)

State: TypeAlias = job_pb2.JobState.ValueType

# The code of the notice that tells of a crash; counted to bound retries, also over restarts of the daemon.
CRASH_NOTICE: Final = "trainer-crashed"
# The code of the notice that a published model is not served, although that was asked for.
NOT_LOADED_NOTICE: Final = "model-not-loaded"
DEFAULT_MAX_RETRIES: Final = 2
# An inference that needs more is no interlude: pause the job.
LONGEST_YIELD_S: Final = 60.0

# Where a study runs: it holds no device, so that any number may run beside each other and their trials.
NO_DEVICE: Final = "none"

FINAL_STATES: Final = frozenset({JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED})

# PAUSED follows PAUSED where a trainer that held its device (a full disk) is gone now.
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    JOB_STATE_UNSPECIFIED: frozenset({JOB_STATE_PREPARING}),
    JOB_STATE_PREPARING: frozenset({JOB_STATE_QUEUED, JOB_STATE_FAILED, JOB_STATE_CANCELLED}),
    JOB_STATE_QUEUED: frozenset(
        {JOB_STATE_QUEUED, JOB_STATE_RUNNING, JOB_STATE_PAUSED, JOB_STATE_FAILED, JOB_STATE_CANCELLED}
    ),
    JOB_STATE_RUNNING: frozenset({JOB_STATE_PAUSED, JOB_STATE_QUEUED, *FINAL_STATES}),
    JOB_STATE_PAUSED: frozenset({JOB_STATE_PAUSED, JOB_STATE_QUEUED, JOB_STATE_RUNNING, *FINAL_STATES}),
    JOB_STATE_SUCCEEDED: frozenset(),
    JOB_STATE_FAILED: frozenset(),
    JOB_STATE_CANCELLED: frozenset(),
}

ALLOWED_COMMANDS: Final[Mapping[State, frozenset[str]]] = {
    JOB_STATE_PREPARING: frozenset({"cancel"}),
    JOB_STATE_QUEUED: frozenset({"pause", "cancel"}),
    JOB_STATE_RUNNING: frozenset(
        {"pause", "cancel", "checkpoint", "evaluate", "set_learning_rate", "yield_to_inference"}
    ),
    JOB_STATE_PAUSED: frozenset({"resume", "cancel"}),
}


def state_name(state: State) -> str:
    """As people say it: "RUNNING"."""
    return job_pb2.JobState.Name(state).removeprefix("JOB_STATE_")


def is_final(event: job_pb2.JobEvent) -> bool:
    """No event follows this one."""
    return event.WhichOneof("body") == "state" and event.state.state in FINAL_STATES


def check_transition(old: State, new: State) -> None:
    """`InternalError` for a change that the table does not have."""
    if new not in TRANSITIONS[old]:
        raise InternalError(f"a job cannot go from {state_name(old)} to {state_name(new)}")


def command_name(command: job_pb2.JobCommand) -> str:
    """Checks the command itself and names it. `InvalidInputError` when empty or out of range."""
    name = command.WhichOneof("command")
    if name is None:
        raise InvalidInputError("no command given", allowed=", ".join(command.DESCRIPTOR.fields_by_name))
    if name == "set_learning_rate":
        rate = command.set_learning_rate.learning_rate
        if not (math.isfinite(rate) and rate > 0):
            raise InvalidInputError(f"the learning rate must be a positive number, not {rate}", value=rate)
    if name == "yield_to_inference":
        seconds = command.yield_to_inference.seconds
        if not 0 <= seconds <= LONGEST_YIELD_S:
            raise InvalidInputError(
                f"a job yields for 0 to {LONGEST_YIELD_S:g} s, not {seconds}: pause it for longer",
                value=seconds,
                allowed=f"0 to {LONGEST_YIELD_S:g}",
            )
    return name


def check_command(state: State, name: str, *, holding: bool) -> None:
    """`JobStateError` naming the state when it does not allow the command.

    `holding`: the job is paused but its trainer lives, waiting for room on the disk; then `pause` ends it.
    """
    allowed = ALLOWED_COMMANDS.get(state, frozenset())
    if holding and state == JOB_STATE_PAUSED:
        allowed |= {"pause"}
    if name not in allowed:
        listed = ", ".join(sorted(allowed))
        what = (
            f"the job has ended ({state_name(state)})"
            if state in FINAL_STATES
            else (f"the job is {state_name(state)}, which allows {listed or 'no command'}")
        )
        raise JobStateError(
            f"{name} is not possible: {what}", state=state_name(state), command=name, allowed=listed
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An event on its way into the public log, with where it came from."""

    event: job_pb2.JobEvent
    sequence: int = 0
    """The trainer's number for it within `event.attempt`; 0: the daemon's own event."""
    early: bool = False
    """It overtook events that the trainer could not write to its journal (full disk)."""


@dataclass(kw_only=True, slots=True)
class JobRecord:
    """What the events so far add up to."""

    message: job_pb2.Job
    crashes: int = 0
    ticket_ns: int = 0
    """Place in the queue: creation, or the last resume. The lowest is next."""
    holding: bool = False
    """Paused by the trainer itself, which lives on and keeps its device."""
    acknowledged: str = ""
    """"pause" or "cancel" once the running trainer has said that it obeys."""
    sequences: dict[int, int] = field(default_factory=dict)
    """Attempt → newest sequence in the public log."""
    early: set[tuple[int, int]] = field(default_factory=set)
    """(attempt, sequence) of events that overtook others."""

    @property
    def state(self) -> State:
        """The state now."""
        return self.message.state

    @property
    def ended(self) -> bool:
        """No event will follow."""
        return self.message.state in FINAL_STATES

    @property
    def max_retries(self) -> int:
        """Starts after a crash before the job fails."""
        resources = self.message.spec.resources
        return resources.max_retries if resources.HasField("max_retries") else DEFAULT_MAX_RETRIES

    @property
    def device(self) -> str:
        """Whose slot the job needs: "cpu", "mps", "cuda:0"; "none" for a study."""
        if self.message.spec.HasField("tune"):
            return NO_DEVICE
        device = self.message.plan.device or "cpu"
        return "cuda:0" if device == "cuda" else device

    def apply(self, entry: Entry) -> None:
        """Takes one event in."""
        event, job = entry.event, self.message
        job.last_event_number = max(job.last_event_number, event.number)
        job.attempt = max(job.attempt, event.attempt)
        if entry.early:
            self.early.add((event.attempt, entry.sequence))
        elif entry.sequence:
            self.sequences[event.attempt] = max(self.sequences.get(event.attempt, 0), entry.sequence)
        match event.WhichOneof("body"):
            case "state":
                self._enter(event.state, event.time, from_trainer=entry.sequence > 0)
            case "progress":
                job.progress.CopyFrom(event.progress)
            case "evaluation":
                job.evaluation.CopyFrom(event.evaluation)
            case "plan":
                job.plan.CopyFrom(event.plan)
            case "trial":
                job.trials.add().CopyFrom(event.trial)
            case "published":
                job.model = f"{event.published.name}:{event.published.version}"
            case "notice":
                self.crashes += event.notice.code == CRASH_NOTICE
            case "command":
                if event.command.command in ("pause", "cancel") and not event.command.HasField("error"):
                    self.acknowledged = event.command.command
            case _:
                pass

    def _enter(
        self, change: job_pb2.StateChange, time: timestamp_pb2.Timestamp, *, from_trainer: bool
    ) -> None:
        job, old = self.message, self.message.state
        job.state, job.state_reason = change.state, change.reason
        job.ClearField("error")
        if change.HasField("error"):
            job.error.CopyFrom(change.error)
        self.holding = from_trainer and change.state == JOB_STATE_PAUSED
        if change.state == JOB_STATE_QUEUED:
            if old == JOB_STATE_PREPARING:
                self.ticket_ns = job.created.ToNanoseconds()
            elif old == JOB_STATE_PAUSED:
                self.ticket_ns = time.ToNanoseconds()
        if change.state == JOB_STATE_RUNNING:
            self.acknowledged = ""
            if not job.HasField("started"):
                job.started.CopyFrom(time)
        if change.state in FINAL_STATES:
            job.finished.CopyFrom(time)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a trainer process ended."""

    finished: trainer_pb2.Finished | None
    """Its last word. None: it was killed or crashed."""
    how: str
    """For a person: "killed by SIGKILL", "exit status 1"."""
    log_end: str = ""
    wanted: str = ""
    """"cancel", "pause" or "suspend" when that was asked for before the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What follows an ending."""

    state: State
    """UNSPECIFIED: preparation has to be run again."""
    reason: str = ""
    error: error_pb2.ErrorDetail | None = None
    crashed: bool = False
    """A notice with the end of the log is due."""
    publish: bool = False
    """The exported model has to be published before `state` is entered."""


def judge(record: JobRecord, ending: Ending) -> Verdict:
    """The state after a trainer process has ended."""
    if ending.finished is not None:
        return _after_own_will(ending.finished, ending)
    if ending.wanted == "cancel":
        return Verdict(state=JOB_STATE_CANCELLED, reason=f"cancelled; the trainer was {ending.how}")
    if ending.wanted == "pause" or record.holding:
        reason = f"the trainer was {ending.how}; a resume continues from its last checkpoint"
        return Verdict(state=JOB_STATE_PAUSED, reason=reason, crashed=True)
    preparing = record.state == JOB_STATE_PREPARING
    if ending.wanted == "suspend" and not preparing:
        return Verdict(state=JOB_STATE_QUEUED, reason=f"the trainer was {ending.how} when the daemon stopped")
    if record.crashes < record.max_retries:
        return Verdict(
            state=JOB_STATE_UNSPECIFIED if preparing else JOB_STATE_QUEUED,
            reason=f"the trainer was {ending.how}; retry {record.crashes + 1} of {record.max_retries}",
            crashed=True,
        )
    crashes = record.crashes + 1
    what = "preparation" if preparing else "the trainer"
    message = f"{what} crashed {crashes} time{'s' * (crashes > 1)}, last {ending.how}"
    error = to_detail(InternalError(f"{message}\n{ending.log_end}".rstrip(), log=ending.log_end))
    return Verdict(state=JOB_STATE_FAILED, reason=message, error=error, crashed=True)


def _after_own_will(finished: trainer_pb2.Finished, ending: Ending) -> Verdict:
    match finished.outcome:
        case trainer_pb2.OUTCOME_PREPARED:
            return Verdict(state=JOB_STATE_QUEUED)
        case trainer_pb2.OUTCOME_SUCCEEDED:
            return Verdict(state=JOB_STATE_SUCCEEDED, publish=True)
        case trainer_pb2.OUTCOME_CANCELLED:
            return Verdict(state=JOB_STATE_CANCELLED, reason="cancelled")
        case trainer_pb2.OUTCOME_PAUSED | trainer_pb2.OUTCOME_SUSPENDED if ending.wanted == "cancel":
            # Asked for while the trainer was leaving already.
            return Verdict(state=JOB_STATE_CANCELLED, reason="cancelled")
        case trainer_pb2.OUTCOME_PAUSED:
            return Verdict(state=JOB_STATE_PAUSED, reason="paused")
        case trainer_pb2.OUTCOME_SUSPENDED:
            if ending.wanted == "pause":
                return Verdict(state=JOB_STATE_PAUSED, reason="paused")
            return Verdict(state=JOB_STATE_QUEUED, reason="suspended; continues from its checkpoint")
        case _:
            error = finished.error if finished.HasField("error") else None
            if error is None:
                error = to_detail(InternalError(f"the trainer failed without a reason\n{ending.log_end}"))
            return Verdict(state=JOB_STATE_FAILED, reason=error.message, error=error)
