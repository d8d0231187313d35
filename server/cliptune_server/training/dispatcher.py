"""Takes jobs through their trainers: preparation, queue, attempts, publishing; listens to the trainers.

Enters: live jobs. Leaves: their changes of state. Called by `jobs.py`; calls the launcher, the scheduler
and the publisher; is the link's peer. Decisions are those of `job.py`, taken one at a time for each job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import structlog

from cliptune.durable import is_disk_full
from cliptune.errors import (
    CliptuneError,
    ConflictError,
    DiskFullError,
    InternalError,
    JobStateError,
    to_detail,
)
from cliptune.internal.v1 import trainer_pb2
from cliptune.tracing import extract_environment, inject_environment, tracer
from cliptune.v1 import job_pb2
from cliptune.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_PREPARING,
    JOB_STATE_QUEUED,
    JOB_STATE_UNSPECIFIED,
)
from cliptune_server.training.job import CRASH_NOTICE, NOT_LOADED_NOTICE, Ending, Verdict, judge, state_name
from cliptune_server.training.job_folder import JobFolder, LaunchNote
from cliptune_server.training.launcher import Launcher, LaunchOrder
from cliptune_server.training.link import Attachment, LinkService
from cliptune_server.training.live_job import LiveJob, new_command_id, notice_event
from cliptune_server.training.publisher import Publication, Publisher
from cliptune_server.training.scheduler import Scheduler, Waiting
from cliptune_server.training.trainer_run import TrainerRun

log = logging.getLogger(__name__)

STOPPING: Final = "the daemon is stopping"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# What a command comes true as.
_FULFILS: Final = {JOB_STATE_CANCELLED: "cancel", JOB_STATE_PAUSED: "pause"}


class Dispatcher:
    """Keeps every live job moving until it ends or waits for a person."""

    def __init__(
        self,
        live: Mapping[str, LiveJob],
        *,
        launcher: Launcher,
        link: LinkService,
        publisher: Publisher,
        data_roots: tuple[Path, ...],
        max_preparing: int,
        cancel_grace_s: float,
        threads: Executor,
    ) -> None:
        self.scheduler: Final = Scheduler()
        self.stopping = False
        self._begun = False
        self._live = live
        self._launcher = launcher
        self._link = link
        self._publisher = publisher
        self._data_roots = data_roots
        self._cancel_grace_s = cancel_grace_s
        self._threads = threads
        self._preparing = asyncio.Semaphore(max_preparing)
        self._runs: dict[str, TrainerRun] = {}
        """The launch under way of each job that has one."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._publishing: dict[str, asyncio.Task[Publication]] = {}

    # --- towards the jobs

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs `work` to its end whoever waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def prepare(self, job: LiveJob) -> None:
        """Puts a new job on its way."""
        self.spawn(self._guard(job, self._prepare(job)))

    def queue(self, job: LiveJob) -> None:
        """Gives a job its place in its device's queue; `schedule` starts what is next."""
        self.scheduler.enqueue(
            Waiting(job_id=job.id, device=job.record.device, ticket_ns=job.record.ticket_ns)
        )

    def schedule(self) -> None:
        """Starts the next job of every free device."""
        if self.stopping or not self._begun:
            return
        for job_id in self.scheduler.start_next():
            self.spawn(self._guard(self._live[job_id], self._run(self._live[job_id])))

    async def take_back(self, job: LiveJob) -> None:
        """After a restart: the job goes on where its folder says that it is. `begin` follows for all."""
        note = await self._in_thread(job.folder.launch_note)
        trainer = await self._in_thread(self._launcher.find, job.folder)
        if trainer is not None:
            run = self._begin_run(job, trainer.note)
            run.trainer = trainer
            if run.holds_device:
                self.scheduler.occupy(job.id, job.record.device)
            self.spawn(self._guard(job, self._follow(job, run)))
        elif note is not None and await self._in_thread(_unsettled, job, note):
            self.spawn(self._guard(job, self._follow(job, self._begin_run(job, note))))
        elif job.state == JOB_STATE_PREPARING:
            self.prepare(job)
        elif job.state == JOB_STATE_QUEUED:
            self.queue(job)

    async def clear_away(self, folder: JobFolder) -> None:
        """Removes a folder that a killed daemon left behind, with the trainer in it."""
        trainer = await self._in_thread(self._launcher.find, folder)
        if trainer is not None:
            await self._in_thread(trainer.kill)
            await trainer.ended()
        await self._in_thread(folder.remove)

    def begin(self) -> None:
        """The queue is whole: starts what is next on each device."""
        self._begun = True
        self.schedule()

    def run_of(self, job_id: str) -> TrainerRun | None:
        """The job's trainer, from its launch until its end is decided on."""
        return self._runs.get(job_id)

    def cancel(self, run: TrainerRun) -> None:
        """The trainer has to end: at once in preparation, within the grace period in a run."""
        run.cancelling = True
        self.spawn(self._escalate(run))

    def yield_to_inference(self, device: str, seconds: float) -> None:
        """Asks the trainers of a device to leave it to inference, those that are attached."""
        command = job_pb2.JobCommand(yield_to_inference=job_pb2.YieldToInferenceCommand(seconds=seconds))
        # Without an id: no event tells of it, and nothing is repeated to a trainer that dials in later.
        instruction = trainer_pb2.Instruction(command=command)
        now_s = asyncio.get_running_loop().time()
        for job_id, run in self._runs.items():
            here = run.holds_device and self._live[job_id].record.device == device
            if here and now_s >= run.yields_until_s:
                run.instruct(instruction)

    async def stop(self, grace_s: float) -> None:
        """Asks every trainer to checkpoint and leave; who is not done after `grace_s` goes on alone."""
        self.stopping = True
        for job in list(self._live.values()):
            run = self._runs.get(job.id)
            if run is not None and run.holds_device:
                run.suspend(new_command_id())
            elif run is not None and run.trainer is not None:
                await self._in_thread(run.trainer.kill)
            await job.nudge()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        # A model that is not published yet will be at the next start.
        for publishing in self._publishing.values():
            publishing.cancel()
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- towards the trainers (LinkPeer)

    def link_secret(self, job_id: str) -> str | None:
        """The secret of a job that has a trainer."""
        job = self._live.get(job_id)
        return job.header.secret if job is not None and job_id in self._runs else None

    async def trainer_attached(self, hello: trainer_pb2.Hello, attachment: Attachment) -> None:
        """Catches up with the trainer's journal. `ConflictError` when its launch is over."""
        run = self._runs.get(hello.job_id)
        if run is None or run.note.attempt != hello.attempt:
            raise ConflictError(f"attempt {hello.attempt} of {hello.job_id} is over")
        await asyncio.shield(self.spawn(run.attach(attachment)))

    async def trainer_sent(self, job_id: str, event: trainer_pb2.TrainerEvent) -> None:
        """Takes an event in."""
        if (run := self._runs.get(job_id)) is not None:
            await run.receive(event)

    def trainer_detached(self, job_id: str, attachment: Attachment) -> None:
        """The trainer may dial again, or be gone."""
        if (run := self._runs.get(job_id)) is not None:
            run.detach(attachment)

    # --- one launch

    def _begin_run(self, job: LiveJob, note: LaunchNote) -> TrainerRun:
        run = self._runs[job.id] = TrainerRun(job, note, self._threads)
        return run

    async def _prepare(self, job: LiveJob) -> None:
        async with self._preparing:
            async with job.deciding:
                if self.stopping or job.state != JOB_STATE_PREPARING:
                    return
                journal_bytes = await self._in_thread(job.folder.journal_bytes, 0)
                note = LaunchNote(mode="prepare", attempt=0, journal_bytes=journal_bytes)
                run = self._begin_run(job, note)
            ending = await self._launch(job, run)
        await self._conclude(job, run, ending)

    async def _run(self, job: LiveJob) -> None:
        async with job.deciding:
            if self.stopping or job.state != JOB_STATE_QUEUED:
                self.scheduler.release(job.id)
                self.schedule()
                return
            former = await self._in_thread(job.folder.launch_note)
            attempt = max(job.record.message.attempt, former.attempt if former else 0) + 1
            run = self._begin_run(job, LaunchNote(mode="run", attempt=attempt))
        ending = await self._launch(job, run)
        await self._conclude(job, run, ending)

    async def _follow(self, job: LiveJob, run: TrainerRun) -> None:
        await self._conclude(job, run, await run.follow())

    async def _launch(self, job: LiveJob, run: TrainerRun) -> Ending:
        """Starts the trainer and waits for its end."""
        context = extract_environment(job.header.trace)
        attributes: dict[str, str | int] = {"cliptune.job_id": job.id, "cliptune.attempt": run.note.attempt}
        with tracer().start_as_current_span(f"job.{run.note.mode}", context=context, attributes=attributes):
            order = LaunchOrder(
                folder=job.folder,
                note=run.note,
                link_address=self._link.address,
                secret=job.header.secret,
                data_roots=self._data_roots,
                trace=inject_environment(),
            )
            try:
                run.trainer = await self._in_thread(self._launcher.launch, order)
            except OSError as error:
                log.warning("job %s: its trainer cannot be started: %s", job.id, error)
                return _not_started(error)
            log.info("job %s: attempt %d started (%s)", job.id, run.note.attempt, run.note.mode)
            if run.cancelling or (self.stopping and not run.holds_device):
                await self._in_thread(run.trainer.kill)
            elif self.stopping:
                run.suspend(new_command_id())
            return await run.follow()

    async def _escalate(self, run: TrainerRun) -> None:
        if run.holds_device:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(run.ended.wait(), self._cancel_grace_s)
        if not run.ended.is_set() and run.trainer is not None:
            await self._in_thread(run.trainer.kill)

    # --- what follows

    async def _conclude(self, job: LiveJob, run: TrainerRun, ending: Ending) -> None:
        async with job.deciding:
            self._runs.pop(job.id, None)
            self.scheduler.release(job.id)
            attempt = run.note.attempt
            verdict = judge(job.record, ending)
            if self.stopping and run.note.mode == "prepare" and ending.finished is None:
                # Killed by the stop: the next start prepares anew, and this was no crash.
                await self._in_thread(job.folder.lock_path.unlink, missing_ok=True)
                await job.nudge()
                return
            log.info("job %s: attempt %d %s", job.id, attempt, ending.how)
            happened = self._what_happened(job, verdict, ending)
            if verdict.publish or verdict.state == JOB_STATE_UNSPECIFIED:
                await job.append_own(happened, attempt=attempt)
            else:
                await job.enter(
                    verdict.state, verdict.reason, error=verdict.error, attempt=attempt, before=happened
                )
        if verdict.publish and ending.finished is not None:
            self.schedule()
            exported = ending.finished.export_path
            await self._publish(job, attempt, job.folder.export_path(exported) if exported else None)
        elif verdict.state == JOB_STATE_UNSPECIFIED:
            self.prepare(job)
        self.schedule()

    def _what_happened(self, job: LiveJob, verdict: Verdict, ending: Ending) -> list[job_pb2.JobEvent]:
        state = job.state if verdict.publish or verdict.state == JOB_STATE_UNSPECIFIED else verdict.state
        late = JobStateError(
            f"the trainer ended before it could do this; the job is {state_name(state)}",
            state=state_name(state),
        )
        events = job.settlements(_FULFILS.get(state, ""), late)
        if verdict.crashed:
            message = f"{verdict.reason}\n{ending.log_end}".rstrip()
            events.append(notice_event(CRASH_NOTICE, message))
        return events

    async def _publish(self, job: LiveJob, attempt: int, export_dir: Path | None) -> None:
        """`export_dir` None: the job makes no model; it has only to be ended."""
        message = job.record.message
        published: list[job_pb2.JobEvent] = []
        try:
            if not message.model and export_dir is not None:
                work = self._publisher.publish(
                    job.id, message.spec.publish, export_dir, dict(message.evaluation.metrics)
                )
                self._publishing[job.id] = asyncio.ensure_future(work)
                answer = await self._publishing[job.id]
                published.append(job_pb2.JobEvent(published=answer.model))
                if answer.not_loaded:
                    published.append(notice_event(NOT_LOADED_NOTICE, answer.not_loaded))
        except DiskFullError as error:
            reason = f"{error.message}; a resume publishes the model"
            await job.enter(JOB_STATE_PAUSED, reason, error=to_detail(error), attempt=attempt)
        except CliptuneError as error:
            await job.enter(JOB_STATE_FAILED, error.message, error=to_detail(error), attempt=attempt)
        else:
            await job.enter(job_pb2.JOB_STATE_SUCCEEDED, attempt=attempt, before=published)
        finally:
            self._publishing.pop(job.id, None)

    async def _guard(self, job: LiveJob, work: Coroutine[Any, Any, None]) -> None:
        """A fault of ours fails the job it met, not its neighbours. What is logged below names the job."""
        structlog.contextvars.bind_contextvars(job_id=job.id)  # of this task alone
        try:
            await work
        except asyncio.CancelledError:
            if not self.stopping:
                raise
        except Exception as error:
            log.exception("job %s: cannot go on", job.id)
            run = self._runs.pop(job.id, None)
            if run is not None and run.trainer is not None:
                await self._in_thread(run.trainer.kill)
            self.scheduler.release(job.id)
            failure = InternalError(f"the daemon cannot take the job on: {error}")
            if not job.record.ended:
                unanswered = job.settlements("", failure)
                await job.enter(
                    JOB_STATE_FAILED, failure.message, error=to_detail(failure), before=unanswered
                )
            self.schedule()

    async def _in_thread(
        self, work: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *arguments, **options))


def _unsettled(job: LiveJob, note: LaunchNote) -> bool:
    """Whether a trainer ended while no daemon was there, so that its end has yet to be told."""
    match job.state:
        case job_pb2.JOB_STATE_RUNNING:
            return True
        case job_pb2.JOB_STATE_PAUSED:
            return job.record.holding
        case job_pb2.JOB_STATE_PREPARING:
            return note.mode == "prepare"
        case job_pb2.JOB_STATE_QUEUED:
            # Started, and not yet seen to run.
            new = note.mode == "run" and note.attempt > job.record.message.attempt
            return new and job.folder.journal_bytes(note.attempt) > 0
        case _:
            return False


def _not_started(error: OSError) -> Ending:
    full = is_disk_full(error)
    kind = DiskFullError if full else InternalError
    detail = to_detail(kind(f"the trainer could not be started: {error}"))
    finished = trainer_pb2.Finished(outcome=trainer_pb2.OUTCOME_FAILED, error=detail)
    return Ending(finished=finished, how="not started")
