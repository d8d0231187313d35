"""A job that has not ended, in the daemon's memory: record, log, unanswered commands.

Enters: events of the trainer and of the daemon, commands. Leaves: numbered events in the log, answers to
those who wait for a command. Made by `jobs.py`; one `LiveJob` per job and process.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, Protocol

from google.protobuf import timestamp_pb2

from cliptune.errors import CliptuneError, UnavailableError, from_detail, to_detail
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import error_pb2, job_pb2, spec_pb2
from cliptune_server.training.event_log import EventLog
from cliptune_server.training.job import Entry, JobRecord, State, check_transition, command_name
from cliptune_server.training.job_folder import JobFolder, JobHeader

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingCommand:
    """A command that the trainer has yet to acknowledge."""

    name: str
    instruction: trainer_pb2.Instruction
    answer: asyncio.Future[int]
    """Number of the event that acknowledges it."""


class JobListener(Protocol):
    """Who keeps lists of jobs up to date."""

    def entered(self, job: LiveJob) -> None:
        """The job is in another state; watchers do not know yet."""
        ...

    async def appended(self, job: LiveJob, entries: Sequence[Entry]) -> None:
        """Events are public."""
        ...


class LiveJob:
    """One unfinished job."""

    def __init__(
        self,
        folder: JobFolder,
        header: JobHeader,
        record: JobRecord,
        events: EventLog,
        listener: JobListener,
    ) -> None:
        self.folder: Final = folder
        self.header: Final = header
        self.record: Final = record
        self.log: Final = events
        self.pending: Final[dict[str, PendingCommand]] = {}
        self.deciding: Final = asyncio.Lock()
        """Held while a command or the end of a trainer decides on the job's next state."""
        self.changed = asyncio.Condition()
        """Notified after every event."""
        self._listener = listener
        self._appending = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        folder: JobFolder,
        header: JobHeader,
        spec: spec_pb2.JobSpec,
        threads: Executor,
        listener: JobListener,
    ) -> LiveJob:
        """Opens the job of a folder and adds up its events. `CorruptLogError` when they cannot be read."""
        message = job_pb2.Job(id=header.id, spec=spec)
        message.created.FromNanoseconds(header.created_ns)
        record = JobRecord(message=message, ticket_ns=header.created_ns)
        events, entries = await EventLog.open(folder.events_path, threads)
        for entry in entries:
            record.apply(entry)
        return cls(folder, header, record, events, listener)

    @property
    def id(self) -> str:
        """The job's."""
        return self.header.id

    @property
    def state(self) -> State:
        """The state now."""
        return self.record.state

    async def append(self, entries: Sequence[Entry]) -> None:
        """Publishes events in this order. Callers shield it from cancellation."""
        if not entries:
            return
        async with self._appending:
            for entry in entries:
                entry.event.job_id = self.id
            await self.log.append(entries)
            for entry in entries:
                self.record.apply(entry)
                match entry.event.WhichOneof("body"):
                    case "command":
                        self._answer(entry.event)
                    case "state":
                        self._listener.entered(self)
                    case _:
                        pass
        await self._listener.appended(self, entries)
        await self.nudge()

    async def nudge(self) -> None:
        """Lets those who wait for `changed` look again."""
        async with self.changed:
            self.changed.notify_all()

    async def append_own(self, events: Sequence[job_pb2.JobEvent], *, attempt: int = 0) -> None:
        """Publishes events of the daemon's; `attempt` names the launch that caused them."""
        await self.append([own_entry(event, attempt=attempt) for event in events])

    async def enter(
        self,
        state: State,
        reason: str = "",
        *,
        error: error_pb2.ErrorDetail | None = None,
        attempt: int = 0,
        before: Sequence[job_pb2.JobEvent] = (),
    ) -> None:
        """Publishes a change of state, after the events `before` it, all at once."""
        check_transition(self.state, state)
        change = job_pb2.StateChange(state=state, reason=reason, error=error)
        await self.append_own([*before, job_pb2.JobEvent(state=change)], attempt=attempt)

    def begin_command(self, command: job_pb2.JobCommand) -> PendingCommand:
        """Notes a command until an event acknowledges it; who has the trainer sends its instruction."""
        instruction = trainer_pb2.Instruction(command_id=new_command_id(), command=command)
        pending = PendingCommand(
            name=command_name(command),
            instruction=instruction,
            answer=asyncio.get_running_loop().create_future(),
        )
        # The caller may have left by the time the answer comes: an error nobody fetches is not a fault.
        pending.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        self.pending[instruction.command_id] = pending
        return pending

    def settlements(self, wanted: str, error: CliptuneError) -> list[job_pb2.JobEvent]:
        """Answers for the commands that the ended trainer left: `wanted` has come true, others fail."""
        return [
            command_event(command_id, pending.name, None if pending.name == wanted else error)
            for command_id, pending in self.pending.items()
        ]

    def abandon(self, reason: str) -> None:
        """The daemon leaves: nobody will learn how the commands under way end."""
        for pending in self.pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(UnavailableError(reason))
        self.pending.clear()

    def _answer(self, event: job_pb2.JobEvent) -> None:
        pending = self.pending.pop(event.command.command_id, None)
        if pending is None or pending.answer.done():
            return
        if event.command.HasField("error"):
            pending.answer.set_exception(from_detail(event.command.error))
        else:
            pending.answer.set_result(event.number)


def new_command_id() -> str:
    """Never the same twice."""
    return uuid.uuid4().hex


def command_event(command_id: str, name: str, error: CliptuneError | None = None) -> job_pb2.JobEvent:
    """The acknowledgement of a command, by the daemon itself."""
    detail = None if error is None else to_detail(error)
    return job_pb2.JobEvent(command=job_pb2.CommandDone(command_id=command_id, command=name, error=detail))


def notice_event(code: str, message: str) -> job_pb2.JobEvent:
    """A warning of the daemon's."""
    notice = job_pb2.Notice(severity=job_pb2.SEVERITY_WARNING, code=code, message=message)
    return job_pb2.JobEvent(notice=notice)


def own_entry(event: job_pb2.JobEvent, *, attempt: int = 0) -> Entry:
    """An event of the daemon's, now; `attempt` names the launch that caused it."""
    now = timestamp_pb2.Timestamp()
    now.GetCurrentTime()
    event.time.CopyFrom(now)
    event.attempt = attempt
    return Entry(event=event)
