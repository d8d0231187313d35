"""Fine-tuning jobs, synchronously: created, watched, steered. Part of `Client`."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import closing

import cliptune.codec as codec
import cliptune.session as sessions
import cliptune.watch as watch
from cliptune.client.connection import Connection
from cliptune.codec import SpecInput
from cliptune.errors import UnavailableError
from cliptune.job import CommandReceipt, Job, JobEvent, JobState
from cliptune.report import JobReport
from cliptune.v1 import job_pb2, training_pb2


class JobCalls(Connection):
    """TrainingService."""

    def create_job(
        self,
        spec: SpecInput,
        *,
        validate_only: bool = False,
        idempotency_key: str = "",
        timeout_s: float | None = None,
    ) -> Job:
        """Submit a spec: a mapping, a `JobSpec` or the path of a TOML, YAML or JSON file.

        `validate_only`: prepare it, return it with its plan, keep nothing. Two calls with one
        `idempotency_key` make one job. `SpecError` names the wrong field; where the shape is wrong, before
        anything is sent.
        """
        call = codec.create_job(spec, validate_only=validate_only, idempotency_key=idempotency_key)
        return self._run(call, timeout_s)

    def get_job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """The job as it stands."""
        return self._run(codec.get_job(job_id), timeout_s)

    def job_report(self, job_id: str, *, timeout_s: float | None = None) -> JobReport:
        """What a job that has succeeded leaves: a page, and its figures. `NotFoundError` for another."""
        return self._run(codec.job_report(job_id), timeout_s)

    def list_jobs(
        self,
        states: Iterable[JobState | str] = (),
        *,
        limit: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Job]:
        """Jobs in these states (default: all), newest first, at most `limit`."""
        states = tuple(states)
        found: list[Job] = []
        token = ""
        while limit is None or len(found) < limit:
            page = self._run(codec.list_jobs(states, token), timeout_s)
            found += page.jobs
            token = page.next_token
            if not token:
                break
        return found[:limit]

    def delete_job(self, job_id: str, *, timeout_s: float | None = None) -> None:
        """Remove a job that has ended, with its checkpoints. `JobStateError` when it has not."""
        self._run(codec.delete_job(job_id), timeout_s)

    def watch_job(
        self, job_id: str, *, after: int = 0, reconnect_s: float = watch.DEFAULT_RECONNECT_S
    ) -> Generator[JobEvent]:
        """Events with a number greater than `after`, then live ones, until the job has ended.

        A lost connection is taken up again after the last event, so that none is missed and none comes twice;
        `UnavailableError` when the daemon stays away for `reconnect_s`.
        """
        cursor = watch.WatchCursor(job_id, after, reconnect_s)
        while not cursor.ended:
            try:
                stream = self._open(watch.METHOD, cursor.request(), training_pb2.WatchJobResponse)
                with closing(stream.answers()) as answers:
                    for answer in answers:
                        event = cursor.accept(answer)
                        if event is not None:
                            yield event
                return
            except UnavailableError as error:
                time.sleep(cursor.wait_s(error))

    def wait_job(self, job_id: str, *, reconnect_s: float = watch.DEFAULT_RECONNECT_S) -> Job:
        """The job when it has ended, whichever way: look at its `state`."""
        job = self.get_job(job_id)
        if not job.state.final:
            for _ in self.watch_job(job_id, after=job.last_event_number, reconnect_s=reconnect_s):
                pass
            job = self.get_job(job_id)
        return job

    def control_job(
        self, job_id: str, command: job_pb2.JobCommand, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Any command; returns when it was carried out. `JobStateError` names a state that forbids it."""
        return self._run(codec.control_job(job_id, command), timeout_s)

    def pause_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Checkpoint, then release the device; returns when the job is PAUSED."""
        return self.control_job(job_id, codec.pause(), timeout_s=timeout_s)

    def resume_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Queue a paused job again."""
        return self.control_job(job_id, codec.resume(), timeout_s=timeout_s)

    def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """End the job; its last checkpoint stays. Returns when it is CANCELLED."""
        return self.control_job(job_id, codec.cancel(), timeout_s=timeout_s)

    def checkpoint_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Save now."""
        return self.control_job(job_id, codec.checkpoint(), timeout_s=timeout_s)

    def evaluate_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Evaluate now; the metrics come as an event."""
        return self.control_job(job_id, codec.evaluate(), timeout_s=timeout_s)

    def set_learning_rate(
        self, job_id: str, learning_rate: float, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Change the peak learning rate of a running job; the schedule's shape stays."""
        return self.control_job(job_id, codec.set_learning_rate(learning_rate), timeout_s=timeout_s)

    def yield_to_inference(
        self, job_id: str, seconds: float, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Leave the device to inference for so long, at most 60 s, from the next step's end; 0 ends it."""
        return self.control_job(job_id, codec.yield_to_inference(seconds), timeout_s=timeout_s)

    def session(self) -> sessions.Session:
        """One stream that watches and controls many jobs."""
        return sessions.Session(
            lambda requests: self._open(sessions.METHOD, requests, training_pb2.SessionResponse)
        )
