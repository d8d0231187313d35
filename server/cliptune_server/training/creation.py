"""New jobs: admitted, laid down in a folder of their own, and sent to be prepared; or only tried out.

Enters: requests. Leaves: live jobs. Called by `jobs.py`; asks admission what may be, and gives the dispatcher
what is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cliptune.durable import is_disk_full
from cliptune.errors import CancelledError, DiskFullError, UnavailableError, from_detail
from cliptune.tracing import inject_environment
from cliptune.v1 import spec_pb2, training_pb2
from cliptune.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PREPARING,
    JOB_STATE_QUEUED,
)
from cliptune_server.training.admission import Admission
from cliptune_server.training.dispatcher import STOPPING, Dispatcher
from cliptune_server.training.job_folder import JobFolder, JobHeader, new_header
from cliptune_server.training.job_index import JobIndex
from cliptune_server.training.live_job import JobListener, LiveJob
from cliptune_server.training.publisher import Publisher


class Creation:
    """Adds to `live`.

    Attributes:
        arriving: specs of jobs that are being admitted: what they name is in use already.
    """

    def __init__(
        self,
        live: dict[str, LiveJob],
        *,
        jobs_dir: Path,
        index: JobIndex,
        dispatcher: Dispatcher,
        admission: Admission,
        publisher: Publisher,
        threads: Executor,
        listener: JobListener,
    ) -> None:
        self._live: Final = live
        self._jobs_dir: Final = jobs_dir
        self._index: Final = index
        self._dispatcher: Final = dispatcher
        self._admission: Final = admission
        self._publisher: Final = publisher
        self._threads: Final = threads
        self._listener: Final = listener
        self._creating: Final = asyncio.Lock()
        self.arriving: list[spec_pb2.JobSpec] = []

    async def create(self, request: training_pb2.CreateJobRequest) -> str:
        """Takes a job in and begins to prepare it; its id, or that of the one which has its key already.

        Errors: those of `Admission.admit`, `DiskFullError`.
        """
        key = request.idempotency_key
        # Before anything is checked: a repeated request is answered even if its data has gone meanwhile.
        if key and (known := await self._id_of_key(key)) is not None:
            return known
        with self._arrival(request.spec):
            spec = await self._admission.admit(request.spec, self._publisher)
            async with self._creating:
                if key and (known := await self._id_of_key(key)) is not None:
                    return known
                header = new_header(
                    spec.name, idempotency_key=key, validate_only=False, trace=inject_environment()
                )
                job = await self._make(header, spec)
        self._dispatcher.prepare(job)
        return job.id

    async def validate(self, request: training_pb2.CreateJobRequest) -> LiveJob:
        """Prepares a job and keeps nothing of it.

        Errors: those of `Admission.admit` and of preparation, `CancelledError`, `UnavailableError`.
        """
        with self._arrival(request.spec):
            return await self._prepared(request)

    async def _prepared(self, request: training_pb2.CreateJobRequest) -> LiveJob:
        spec = await self._admission.admit(request.spec, self._publisher)
        header = new_header(spec.name, idempotency_key="", validate_only=True, trace=inject_environment())
        making = self._dispatcher.spawn(self._make(header, spec))
        try:
            job: LiveJob = await asyncio.shield(making)
            self._dispatcher.prepare(job)
            async with job.changed:
                await job.changed.wait_for(
                    lambda: job.state != JOB_STATE_PREPARING or self._dispatcher.stopping
                )
        finally:
            # Also when the caller has left. A daemon that stops leaves it to the next one.
            if not self._dispatcher.stopping:
                await asyncio.shield(self._dispatcher.spawn(self._discard(making)))
        if self._dispatcher.stopping:
            raise UnavailableError(STOPPING)
        if job.state == JOB_STATE_FAILED:
            raise from_detail(job.record.message.error)
        if job.state != JOB_STATE_QUEUED:
            raise CancelledError("the preparation was cancelled")
        return job

    async def _make(self, header: JobHeader, spec: spec_pb2.JobSpec) -> LiveJob:
        loop = asyncio.get_running_loop()
        try:
            folder = await loop.run_in_executor(self._threads, JobFolder.create, self._jobs_dir, header, spec)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(f"no room for a new job in {self._jobs_dir}") from error
            raise
        job = await LiveJob.open(folder, header, spec, self._threads, self._listener)
        self._live[job.id] = job
        await job.enter(JOB_STATE_PREPARING)
        return job

    @contextmanager
    def _arrival(self, spec: spec_pb2.JobSpec) -> Iterator[None]:
        """From before its data is looked at until the job is there."""
        self.arriving.append(spec)
        try:
            yield
        finally:
            self.arriving = [other for other in self.arriving if other is not spec]

    async def _id_of_key(self, key: str) -> str | None:
        live = (job.id for job in self._live.values() if job.header.idempotency_key == key)
        return next(live, None) or await self._index.id_of_key(key)

    async def _discard(self, making: asyncio.Task[LiveJob]) -> None:
        """Removes a job that was only to be validated."""
        job = await making
        async with job.deciding:
            run = self._dispatcher.run_of(job.id)
            if job.state == JOB_STATE_PREPARING and run is None:
                await job.enter(JOB_STATE_CANCELLED)
        if run is not None:
            self._dispatcher.cancel(run)
            await run.ended.wait()
            async with job.changed:
                await job.changed.wait_for(lambda: self._dispatcher.run_of(job.id) is None)
        self._live.pop(job.id, None)
        await asyncio.get_running_loop().run_in_executor(self._threads, job.folder.remove)
