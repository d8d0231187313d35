"""One launch of a trainer, followed from its start, or from its being found again, to its end.

Enters: what the trainer sends over the link, what its journal holds, its end. Leaves: public events, each
once and in order; at last an `Ending`. Made by `jobs.py`.

The journal is the truth: an event from the link is taken when it is the next one, dropped when it is known,
and read from the journal with all before it when it leaves a gap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Final

from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune.v1.job_pb2 import JOB_STATE_PAUSED, JOB_STATE_QUEUED, JOB_STATE_RUNNING
from cliptune_server.training.job import TRANSITIONS, Ending, Entry
from cliptune_server.training.job_folder import LaunchNote
from cliptune_server.training.journal_reader import JournalReader
from cliptune_server.training.launcher import Trainer
from cliptune_server.training.link import Attachment
from cliptune_server.training.live_job import LiveJob

log = logging.getLogger(__name__)

# Events wait here while earlier ones are written; the link's flow control holds back what does not fit.
_INBOX_EVENTS: Final = 1024


class TrainerRun:
    """The daemon's side of one trainer process."""

    def __init__(self, job: LiveJob, note: LaunchNote, threads: Executor) -> None:
        self.note: Final = note
        self.trainer: Trainer | None = None
        """None until it is launched, and for one that ended while no daemon was there."""
        self.cancelling = False
        """Somebody asked for the job's end: whatever the trainer does, it will not be retried."""
        self.yields_until_s = 0.0
        """On the loop's clock: a user asked it to yield, which the daemon's own leases must not cut short."""
        self.ended: Final = asyncio.Event()
        self._job = job
        self._threads = threads
        self._reader = JournalReader(job.folder.journal_path(note.attempt))
        self._inbox: asyncio.Queue[trainer_pb2.TrainerEvent | None] = asyncio.Queue(_INBOX_EVENTS)
        self._ingesting = asyncio.Lock()
        self._known = job.record.sequences.get(note.attempt, 0)
        self._finished: trainer_pb2.Finished | None = None
        self._attachment: Attachment | None = None
        self._suspend: trainer_pb2.Instruction | None = None

    @property
    def holds_device(self) -> bool:
        """Preparation needs no slot."""
        return self.note.mode == "run"

    def instruct(self, instruction: trainer_pb2.Instruction) -> None:
        """Sends an instruction if the trainer is attached; `attach` sends what was not acknowledged."""
        if self._attachment is not None:
            self._attachment.send(instruction)

    def suspend(self, command_id: str) -> None:
        """Asks the trainer to checkpoint and leave, over the link or, where that is down, by a signal."""
        self._suspend = trainer_pb2.Instruction(command_id=command_id, suspend=trainer_pb2.Suspend())
        if self._attachment is not None:
            self._attachment.send(self._suspend)
        elif self.trainer is not None:
            self.trainer.suspend()

    async def attach(self, attachment: Attachment) -> None:
        """The trainer has dialled in (again): catch up with its journal, repeat what it may have missed."""
        async with self._ingesting:
            await self._catch_up()
            await self._mark_running()
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = attachment
        for pending in self._job.pending.values():
            attachment.send(pending.instruction)
        if self._suspend is not None:
            attachment.send(self._suspend)

    def detach(self, attachment: Attachment) -> None:
        """A connection is gone; a newer one stays."""
        if self._attachment is attachment:
            self._attachment = None

    async def receive(self, event: trainer_pb2.TrainerEvent) -> None:
        """An event from the link. Waits while too many are before it."""
        await self._inbox.put(event)

    async def follow(self) -> Ending:
        """Ingests until the process has ended and its journal is read to the end."""
        pump = asyncio.create_task(self._pump())
        how = "gone while no daemon was there"
        try:
            if self.trainer is not None:
                how = await self.trainer.ended()
        finally:
            # Also when the daemon leaves first: what is being written is written to its end.
            await self._inbox.put(None)
            await pump
        async with self._ingesting:
            await self._catch_up()
            if self._finished is not None:
                await self._mark_running()
        self.ended.set()
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None
        log_end = await asyncio.get_running_loop().run_in_executor(self._threads, self._job.folder.log_end)
        return Ending(finished=self._finished, how=how, log_end=log_end, wanted=self._wanted())

    def _wanted(self) -> str:
        names = {pending.name for pending in self._job.pending.values()}
        names.add(self._job.record.acknowledged)
        if self.cancelling or "cancel" in names:
            return "cancel"
        if "pause" in names:
            return "pause"
        return "suspend" if self._suspend is not None else ""

    async def _pump(self) -> None:
        over = False
        while not over:
            batch = [await self._inbox.get()]
            while not self._inbox.empty():
                batch.append(self._inbox.get_nowait())
            over = None in batch
            events = [event for event in batch if event is not None]
            try:
                async with self._ingesting:
                    await self._ingest(events)
            except Exception:
                # They are in the journal: the next gap, or the end, brings them again.
                log.exception("job %s: %d events could not be taken in yet", self._job.id, len(events))

    async def _ingest(self, events: Iterable[trainer_pb2.TrainerEvent]) -> None:
        accepted: list[Entry] = []
        for event in events:
            if event.attempt != self.note.attempt or event.sequence <= self._known:
                continue
            if event.sequence > self._known + 1:
                await self._publish(accepted)
                accepted = []
                await self._catch_up()
            if event.sequence == self._known + 1:
                accepted.extend(self._accept(event))
            elif event.sequence > self._known and self._overtakes(event):
                accepted.append(self._entry(event, early=True))
        await self._publish(accepted)

    async def _catch_up(self) -> None:
        """Takes in what the journal holds beyond what is known."""
        lines = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._reader.read_after, self._known
        )
        accepted: list[Entry] = []
        for line in lines:
            event = line.event
            if event.sequence <= self._known:
                continue
            if event.sequence > self._known + 1:
                log.warning("job %s: the journal lacks events before %d", self._job.id, event.sequence)
            accepted.extend(self._accept(event))
            if event.WhichOneof("body") == "finished" and line.offset < self.note.journal_bytes:
                # The last word of an earlier process of this attempt.
                self._finished = None
        await self._publish(accepted)

    def _accept(self, event: trainer_pb2.TrainerEvent) -> list[Entry]:
        """The public events of the next event in order."""
        self._known = event.sequence
        match event.WhichOneof("body"):
            case "finished":
                self._finished = event.finished
            case "event":
                self._finished = None
                if (event.attempt, event.sequence) not in self._job.record.early:
                    return [self._entry(event)]
            case _:
                pass
        return []

    def _overtakes(self, event: trainer_pb2.TrainerEvent) -> bool:
        """The disk is full: the journal lacks what came before, but the pause must be seen now, once."""
        seen = (event.attempt, event.sequence) in self._job.record.early
        return event.event.WhichOneof("body") == "state" and not seen

    def _entry(self, event: trainer_pb2.TrainerEvent, *, early: bool = False) -> Entry:
        public = job_pb2.JobEvent()
        public.CopyFrom(event.event)
        public.time.CopyFrom(event.time)
        public.attempt = event.attempt
        return Entry(event=public, sequence=event.sequence, early=early)

    async def _publish(self, entries: list[Entry]) -> None:
        if not entries:
            return
        try:
            await self._publish_allowed(entries)
        except BaseException:
            self._known = self._job.record.sequences.get(self.note.attempt, 0)
            self._reader.rewind()
            raise

    async def _publish_allowed(self, entries: list[Entry]) -> None:
        await self._mark_running()
        state = self._job.state
        allowed = []
        for entry in entries:
            if entry.event.WhichOneof("body") == "state":
                change = entry.event.state.state
                if change not in (JOB_STATE_PAUSED, JOB_STATE_RUNNING) or change not in TRANSITIONS[state]:
                    log.warning("job %s: its trainer may not say %s", self._job.id, entry.event.state)
                    continue
                state = change
            allowed.append(entry)
        await self._job.append(allowed)

    async def _mark_running(self) -> None:
        if self.holds_device and self._job.state == JOB_STATE_QUEUED:
            await self._job.enter(JOB_STATE_RUNNING, attempt=self.note.attempt)
