"""TrainingService over real gRPC from a process of its own, which is killed and comes back."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cliptune.errors import JobNotFoundError, JobStateError, SpecError, UnavailableError
from cliptune.v1 import job_pb2, spec_pb2, training_pb2, training_pb2_grpc
from cliptune.v1.job_pb2 import JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED
from cliptune.wire import error_from_rpc
from cliptune_server.training.job_folder import JobFolder
from tests.server.training.house import LIMIT_S, assert_gapless, at_step, peer_spec, states

LONG = 100_000


@dataclass(kw_only=True, slots=True)
class Served:
    """A running job daemon."""

    process: asyncio.subprocess.Process
    stub: training_pb2_grpc.TrainingServiceAsyncStub

    async def create(self, spec: spec_pb2.JobSpec) -> str:
        response = await self.stub.CreateJob(training_pb2.CreateJobRequest(spec=spec), timeout=LIMIT_S)
        return response.job.id

    async def watch(
        self, job_id: str, after: int = 0, *, step: int = 0, attempt: int = 1
    ) -> list[job_pb2.JobEvent]:
        """Events up to a step, or all."""
        request = training_pb2.WatchJobRequest(job_id=job_id, after_number=after)
        call = self.stub.WatchJob(request, timeout=LIMIT_S)
        events = []
        async for response in call:
            events.append(response.event)
            if step and at_step(step, attempt)(response.event):
                call.cancel()
                break
        return events

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


def wait_for_end(folder: JobFolder) -> None:
    """Returns when no trainer holds the folder's lock."""
    with folder.lock_path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


@asynccontextmanager
async def serving(root: Path) -> AsyncIterator[Served]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.server.training.jobs_daemon", str(root), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        port = int(await asyncio.wait_for(process.stdout.readline(), LIMIT_S))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(process=process, stub=training_pb2_grpc.TrainingServiceStub(channel))
        if process.returncode is None:
            process.terminate()
        assert await asyncio.wait_for(process.wait(), LIMIT_S) in (0, -signal.SIGKILL)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_killed_daemon_takes_its_jobs_back_and_watchers_miss_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        job_id = await daemon.create(peer_spec(tmp_path, steps=600))
        waiting_id = await daemon.create(peer_spec(tmp_path, "waits", steps=3))
        seen = await daemon.watch(job_id, step=20)
        await daemon.kill()
    note = JobFolder(tmp_path / "home" / "jobs" / job_id).launch_note()
    assert note is not None
    os.kill(note.pid, 0)  # the trainer goes on
    async with serving(tmp_path) as daemon:
        more = await daemon.watch(job_id, seen[-1].number)
        everything = seen + more
        assert_gapless(everything)
        steps = [event.progress.step for event in everything if event.HasField("progress")]
        assert steps == list(range(1, 601))
        assert states(everything) == ["PREPARING", "QUEUED", "RUNNING", "SUCCEEDED"]
        assert {event.attempt for event in everything} == {0, 1}
        assert states(await daemon.watch(waiting_id))[-1] == "SUCCEEDED"
        assert await daemon.watch(job_id) == everything


async def test_a_trainer_that_ended_without_a_daemon_is_published_at_the_next_start(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        job_id = await daemon.create(peer_spec(tmp_path, steps=100))
        seen = await daemon.watch(job_id, step=5)
        await daemon.kill()
    folder = JobFolder(tmp_path / "home" / "jobs" / job_id)
    await asyncio.wait_for(asyncio.to_thread(wait_for_end, folder), LIMIT_S)
    async with serving(tmp_path) as daemon:
        everything = seen + await daemon.watch(job_id, seen[-1].number)
        assert_gapless(everything)
        assert states(everything)[-1] == "SUCCEEDED"
        assert [e.progress.step for e in everything if e.HasField("progress")] == list(range(1, 101))
        job = (await daemon.stub.GetJob(training_pb2.GetJobRequest(job_id=job_id))).job
        assert job.model == "peer:1"
        assert job.attempt == 1


async def test_a_command_reaches_a_trainer_that_an_earlier_daemon_started(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        job_id = await daemon.create(peer_spec(tmp_path, steps=LONG))
        seen = await daemon.watch(job_id, step=5)
        await daemon.kill()
    async with serving(tmp_path) as daemon:
        command = job_pb2.JobCommand(pause=job_pb2.PauseCommand())
        request = training_pb2.ControlJobRequest(job_id=job_id, command=command)
        answer = await daemon.stub.ControlJob(request, timeout=LIMIT_S)
        command = job_pb2.JobCommand(cancel=job_pb2.CancelCommand())
        await daemon.stub.ControlJob(
            training_pb2.ControlJobRequest(job_id=job_id, command=command), timeout=LIMIT_S
        )
        everything = seen + await daemon.watch(job_id, seen[-1].number)
        assert_gapless(everything)
        assert everything[answer.event_number - 1].command.command == "pause"
        assert states(everything)[-1] == "CANCELLED"


async def test_one_session_watches_and_controls_several_jobs(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        ids = [
            await daemon.create(peer_spec(tmp_path, f"j{n}", steps=LONG, device=device))
            for n, device in enumerate(("cpu", "mps"))
        ]
        call = daemon.stub.Session(timeout=LIMIT_S)
        for n, job_id in enumerate(ids):
            watch = training_pb2.WatchJobRequest(job_id=job_id)
            await call.write(training_pb2.SessionRequest(request_id=f"w{n}", watch=watch))
        await call.write(
            training_pb2.SessionRequest(request_id="none", watch=training_pb2.WatchJobRequest(job_id="no"))
        )
        cancel = job_pb2.JobCommand(cancel=job_pb2.CancelCommand())
        resume = job_pb2.JobCommand(resume=job_pb2.ResumeCommand())
        events: dict[str, list[job_pb2.JobEvent]] = {job_id: [] for job_id in ids}
        answers: dict[str, training_pb2.SessionResponse] = {}
        ended = []
        asked: set[str] = set()
        async for response in call:
            match response.WhichOneof("result"):
                case "event":
                    event = response.event
                    events[event.job_id].append(event)
                    if event.job_id not in asked and event.state.state == JOB_STATE_RUNNING:
                        asked.add(event.job_id)
                        for command in (resume, cancel):
                            control = training_pb2.ControlJobRequest(job_id=event.job_id, command=command)
                            request_id = f"{command.WhichOneof('command')} {event.job_id}"
                            await call.write(
                                training_pb2.SessionRequest(request_id=request_id, control=control)
                            )
                        if len(asked) == len(ids):
                            await call.done_writing()
                case "watch_ended_job_id":
                    ended.append(response.watch_ended_job_id)
                case _:
                    answers[response.request_id] = response
        assert sorted(ended) == sorted(ids)
        assert answers["none"].error.reason == "JobNotFoundError"
        for n, job_id in enumerate(ids):
            assert answers[f"w{n}"].done
            assert answers[f"resume {job_id}"].error.reason == "JobStateError"
            number = answers[f"cancel {job_id}"].control.event_number
            assert events[job_id][number - 1].command.command == "cancel"
            assert_gapless(events[job_id])


async def test_a_session_stops_watching_when_told(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        job_id = await daemon.create(peer_spec(tmp_path, steps=LONG))
        call = daemon.stub.Session(timeout=LIMIT_S)
        watch = training_pb2.WatchJobRequest(job_id=job_id)
        await call.write(training_pb2.SessionRequest(request_id="1", watch=watch))
        await call.write(training_pb2.SessionRequest(request_id="2", watch=watch))
        await call.write(training_pb2.SessionRequest(request_id="3", unwatch_job_id=job_id))
        await call.write(training_pb2.SessionRequest(request_id="4", unwatch_job_id=job_id))
        await call.done_writing()
        answers = {r.request_id: r async for r in call if r.request_id}
        assert answers["2"].error.reason == "ConflictError"
        assert answers["3"].done
        assert answers["4"].error.reason == "ConflictError"


async def test_errors_keep_their_class_over_the_wire(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        spec = peer_spec(tmp_path, steps=3)
        job_id = await daemon.create(spec)
        await daemon.watch(job_id)
        spec.train.batch_size = -1
        pause = job_pb2.JobCommand(pause=job_pb2.PauseCommand())
        for call, kind in (
            (daemon.stub.CreateJob(training_pb2.CreateJobRequest(spec=spec)), SpecError),
            (daemon.stub.GetJob(training_pb2.GetJobRequest(job_id="../..")), JobNotFoundError),
            (
                daemon.stub.ControlJob(training_pb2.ControlJobRequest(job_id=job_id, command=pause)),
                JobStateError,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert type(error_from_rpc(failed.value)) is kind
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await daemon.watch("nobody")
        assert type(error_from_rpc(failed.value)) is JobNotFoundError
        await daemon.stub.DeleteJob(training_pb2.DeleteJobRequest(job_id=job_id))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await daemon.stub.GetJob(training_pb2.GetJobRequest(job_id=job_id))
        assert type(error_from_rpc(failed.value)) is JobNotFoundError


async def test_a_stopping_daemon_ends_watches_with_unavailable_after_the_last_event(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        job_id = await daemon.create(peer_spec(tmp_path, steps=LONG))
        await daemon.watch(job_id, step=3)
        call = daemon.stub.WatchJob(training_pb2.WatchJobRequest(job_id=job_id), timeout=LIMIT_S)
        seen: list[job_pb2.JobEvent] = []
        with pytest.raises(grpc.aio.AioRpcError) as ended:  # noqa: PT012
            async for response in call:
                seen.append(response.event)
                if len(seen) == 1:
                    daemon.process.terminate()
        assert type(error_from_rpc(ended.value)) is UnavailableError
        assert states(seen)[-1] == "QUEUED"
        assert_gapless(seen)
    assert JOB_STATE_SUCCEEDED not in {event.state.state for event in seen}
