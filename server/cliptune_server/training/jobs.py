"""Fine-tuning jobs: create, get, list, delete, watch, control. The application object behind both faces.

Enters: requests as protobuf messages. Leaves: protobuf messages, or errors of `cliptune.errors`. Called by
`rpc/training.py` and the gateway. Composes what does the work: admission (what a job may ask for), the
dispatcher (trainers, queue), creation (new jobs), control (commands), the index (lists), and one `LiveJob`
for each job that has not ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cliptune.errors import (
    JobNotFoundError,
    JobStateError,
    NotFoundError,
    UnavailableError,
)
from cliptune.tracing import tracer
from cliptune.v1 import job_pb2, training_pb2
from cliptune.v1.job_pb2 import (
    JOB_STATE_PREPARING,
    JOB_STATE_QUEUED,
)
from cliptune_server.config import JobsConfig
from cliptune_server.database import Database
from cliptune_server.home import Home
from cliptune_server.training.admission import Admission
from cliptune_server.training.control import Control
from cliptune_server.training.creation import Creation
from cliptune_server.training.data_names import DataNames, reads_data_set
from cliptune_server.training.dispatcher import STOPPING, Dispatcher
from cliptune_server.training.event_log import CorruptLogError, replay
from cliptune_server.training.job import FINAL_STATES, Entry, check_command, command_name, state_name
from cliptune_server.training.job_folder import CorruptJobError, JobFolder, sweep
from cliptune_server.training.job_index import JobIndex
from cliptune_server.training.launcher import Launcher
from cliptune_server.training.link import LinkService
from cliptune_server.training.live_job import LiveJob
from cliptune_server.training.publisher import Publisher

log = logging.getLogger(__name__)

_FILE_THREADS: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsSnapshot:
    """The jobs at one moment, for metrics."""

    by_state: Mapping[str, int]
    """ "RUNNING" → how many; also of jobs that have ended."""
    events: int
    """Public events since the daemon started."""
    watchers: int
    """Watches open now."""
    waiting_by_device: Mapping[str, int]
    running_by_device: Mapping[str, int]


class Jobs:
    """All jobs of one home."""

    def __init__(
        self,
        *,
        home: Home,
        database: Database,
        launcher: Launcher,
        link: LinkService,
        publisher: Publisher,
        data_names: DataNames,
        config: JobsConfig,
    ) -> None:
        self._home = home
        self._index = JobIndex(database)
        self._link = link
        admission = Admission(
            data_dir=home.data_dir,
            models_dir=home.models_dir,
            data_roots=config.data_roots,
            data_names=data_names,
        )
        self._threads = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="jobs")
        self._live: dict[str, LiveJob] = {}
        self._dispatcher = Dispatcher(
            self._live,
            launcher=launcher,
            link=link,
            publisher=publisher,
            data_roots=admission.roots,
            max_preparing=config.max_preparing,
            cancel_grace_s=config.cancel_grace_s,
            threads=self._threads,
        )
        self._control = Control(self._dispatcher, settle_s=config.settle_s)
        self._creation = Creation(
            self._live,
            jobs_dir=home.jobs_dir,
            index=self._index,
            dispatcher=self._dispatcher,
            admission=admission,
            publisher=publisher,
            threads=self._threads,
            listener=self,
        )
        self._ended: Counter[str] = Counter()
        self._events = 0
        self._watchers = 0

    # --- life

    async def start(self) -> None:
        """Reads the home's jobs, listens to trainers, takes jobs back where they are, starts what is next."""
        loop = asyncio.get_running_loop()
        folders = await loop.run_in_executor(self._threads, sweep, self._home.jobs_dir)
        await self._index.keep_only({folder.id for folder in folders})
        known = await self._index.ended_ids()
        for folder in folders:
            if folder.id not in known:
                await self._load(folder)
        counts = await self._index.count_by_state()
        self._ended = Counter({state_name(state): counts[state_name(state)] for state in FINAL_STATES})
        await self._link.start(self._dispatcher)
        for job in list(self._live.values()):
            await self._dispatcher.take_back(job)
        self._dispatcher.begin()

    async def stop(self, grace_s: float) -> None:
        """Asks trainers to checkpoint and leave, waits at most `grace_s`, then ends all watches."""
        await self._dispatcher.stop(grace_s)
        await self._link.stop()
        for job in self._live.values():
            job.abandon(STOPPING)
            job.log.close(UnavailableError(STOPPING))
        self._threads.shutdown(wait=False)

    # --- calls

    async def create(self, request: training_pb2.CreateJobRequest) -> job_pb2.Job:
        """Accepts a job and begins to prepare it; with `validate_only`, prepares it and keeps nothing.

        Errors: those of `Admission.admit`, of preparation (`validate_only`), `DiskFullError`.
        """
        self._refuse_when_stopping()
        with tracer().start_as_current_span("job.create"):
            if request.validate_only:
                return self._message(await self._creation.validate(request))
            # To its end even if the caller leaves: a job is there or it is not.
            return await self.get(
                await asyncio.shield(self._dispatcher.spawn(self._creation.create(request)))
            )

    async def get(self, job_id: str) -> job_pb2.Job:
        """The job now. `JobNotFoundError`."""
        job = self._live.get(job_id)
        if job is not None and not job.header.validate_only:
            return self._message(job)
        message = await self._index.get(job_id)
        if message is None:
            raise JobNotFoundError(f"there is no job {job_id!r}", job_id=job_id)
        return message

    async def artifact(self, job_id: str, kind: str, name: str) -> bytes:
        """A file that the job has left for people, see `JobFolder.artifact`. Raises `NotFoundError`."""
        await self.get(job_id)
        folder = JobFolder(self._home.jobs_dir / job_id)
        content = await asyncio.get_running_loop().run_in_executor(self._threads, folder.artifact, kind, name)
        if content is None:
            raise NotFoundError(f"the job {job_id!r} has no {kind}/{name}")
        return content

    async def list(self, request: training_pb2.ListJobsRequest) -> training_pb2.ListJobsResponse:
        """A page of jobs, newest first."""
        page = await self._index.page(request.states, request.page_size, request.page_token)
        jobs = (self._message(self._live[job.id]) if job.id in self._live else job for job in page.jobs)
        return training_pb2.ListJobsResponse(jobs=jobs, next_page_token=page.next_token)

    async def delete(self, job_id: str) -> None:
        """Removes an ended job with its checkpoints. `JobStateError` for one that has not ended."""
        self._refuse_when_stopping()
        job = await self.get(job_id)
        if job.state not in FINAL_STATES:
            name = state_name(job.state)
            raise JobStateError(f"the job is {name}; only an ended one can be deleted", state=name)
        await asyncio.shield(self._dispatcher.spawn(self._delete(job)))

    async def control(self, job_id: str, command: job_pb2.JobCommand) -> training_pb2.ControlJobResponse:
        """Tells the job something; returns when it has obeyed: after a pause or a cancel it is in that state.

        `JobStateError` naming the state when that does not allow the command, or the trainer's own error;
        `DeadlineExceededError` when the trainer agreed to end and has not.
        """
        self._refuse_when_stopping()
        name = command_name(command)
        job = self._live.get(job_id)
        if job is None or job.header.validate_only:
            check_command((await self.get(job_id)).state, name, holding=False)
            raise JobStateError("the job has just ended", state="ENDED")
        answer = await self._control.carry_out(job, command)
        answer.job.CopyFrom(await self.get(job_id))
        return answer

    def users_of(self, name: str, files: Path) -> Sequence[str]:
        """The jobs that have not ended and read the data set `name`, whose files lie in `files`: their ids.

        A job that is being created has no id yet, and is told by its name.
        """
        live = (job for job in self._live.values() if not job.record.ended)
        users = [job.id for job in live if reads_data_set(job.record.message.spec, name, files)]
        return users + [
            f"{spec.name} (new)" for spec in self._creation.arriving if reads_data_set(spec, name, files)
        ]

    def yield_to_inference(self, device: str, seconds: float) -> None:
        """Asks the trainers on a device ("mps", "cuda:0") to leave it to inference; 0: to go on. No event."""
        self._dispatcher.yield_to_inference(device, seconds)

    async def watch(self, job_id: str, after_number: int = 0) -> AsyncGenerator[job_pb2.JobEvent]:
        """Every event with a greater number, in order, once; ends after the final one.

        `JobNotFoundError` at the first step; `UnavailableError` when the daemon stops: watch the next one
        from the last number seen.
        """
        job = self._live.get(job_id)
        if job is not None and not job.header.validate_only:
            events = job.log.follow(after_number)
        else:
            await self.get(job_id)
            events = replay(JobFolder(self._home.jobs_dir / job_id).events_path, self._threads, after_number)
        self._watchers += 1
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        except FileNotFoundError:
            raise JobNotFoundError(f"the job {job_id!r} was deleted", job_id=job_id) from None
        except RuntimeError:
            if not self._dispatcher.stopping:
                raise
            # The threads that read files have gone with the daemon.
            raise UnavailableError(STOPPING) from None
        finally:
            self._watchers -= 1

    def snapshot(self) -> JobsSnapshot:
        """Counts for metrics."""
        shown = [job for job in self._live.values() if not job.header.validate_only]
        by_state = self._ended + Counter(state_name(job.state) for job in shown)
        return JobsSnapshot(
            by_state=dict(by_state),
            events=self._events,
            watchers=self._watchers,
            waiting_by_device=self._dispatcher.scheduler.waiting_by_device(),
            running_by_device=self._dispatcher.scheduler.running_by_device(),
        )

    # --- the rest

    async def _delete(self, job: job_pb2.Job) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, JobFolder(self._home.jobs_dir / job.id).remove)
        await self._index.forget(job.id)
        self._ended[state_name(job.state)] -= 1

    async def _load(self, folder: JobFolder) -> None:
        """Takes a job of an earlier daemon into memory, or only into the index when it has ended."""
        loop = asyncio.get_running_loop()
        try:
            header, spec = await loop.run_in_executor(self._threads, folder.load)
            if header.validate_only:
                await self._dispatcher.clear_away(folder)
                return
            job = await LiveJob.open(folder, header, spec, self._threads, self)
            if job.state == job_pb2.JOB_STATE_UNSPECIFIED:
                await job.enter(JOB_STATE_PREPARING)
        except (CorruptJobError, CorruptLogError, OSError) as error:
            log.error("the job in %s is damaged and is left alone: %s", folder.root, error)
            return
        if not (await self._index.save(job) and job.record.ended):
            self._live[job.id] = job

    def entered(self, job: LiveJob) -> None:
        """Keeps the queue in step with the states (`JobListener`)."""
        if job.state == JOB_STATE_QUEUED and not job.header.validate_only:
            self._dispatcher.queue(job)

    async def appended(self, job: LiveJob, entries: Sequence[Entry]) -> None:
        """Keeps the index in step with the states (`JobListener`)."""
        self._events += len(entries)
        new_state = any(entry.event.WhichOneof("body") == "state" for entry in entries)
        if job.header.validate_only or not new_state:
            return
        saved = await self._index.save(job)
        if job.record.ended and saved:
            self._live.pop(job.id, None)
            self._ended[state_name(job.state)] += 1

    def _message(self, job: LiveJob) -> job_pb2.Job:
        message = job_pb2.Job()
        message.CopyFrom(job.record.message)
        message.queue_position = self._dispatcher.scheduler.position(job.id)
        return message

    def _refuse_when_stopping(self) -> None:
        if self._dispatcher.stopping:
            raise UnavailableError(STOPPING)
