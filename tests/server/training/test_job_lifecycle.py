"""Jobs from creation to their end, with trainer processes that speak the real protocol."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import signal
from pathlib import Path

import pytest
import structlog

from cliptune.errors import (
    DataError,
    DeadlineExceededError,
    InvalidInputError,
    JobNotFoundError,
    JobStateError,
    PathOutsideRootsError,
    SpecError,
    UnavailableError,
)
from cliptune.v1 import job_pb2, training_pb2
from cliptune.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
)
from cliptune_server.training.job_folder import JobFolder
from cliptune_server.training.jobs import Jobs
from tests.server.training.house import (
    FolderPublisher,
    assert_gapless,
    at_step,
    collect,
    create,
    in_state,
    open_jobs,
    peer_spec,
    states,
)

PAUSE = job_pb2.JobCommand(pause=job_pb2.PauseCommand())
RESUME = job_pb2.JobCommand(resume=job_pb2.ResumeCommand())
CANCEL = job_pb2.JobCommand(cancel=job_pb2.CancelCommand())
CHECKPOINT = job_pb2.JobCommand(checkpoint=job_pb2.CheckpointCommand())
LONG = 100_000


def yield_for(seconds: float) -> job_pb2.JobCommand:
    return job_pb2.JobCommand(yield_to_inference=job_pb2.YieldToInferenceCommand(seconds=seconds))


def trainer_pid(root: Path, job_id: str) -> int:
    note = JobFolder(root / "home" / "jobs" / job_id).launch_note()
    assert note is not None
    return note.pid


async def test_a_job_prepares_queues_runs_and_is_published(tmp_path: Path) -> None:
    publisher = FolderPublisher()
    async with open_jobs(tmp_path, publisher=publisher) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=5))
        assert job.state == job_pb2.JOB_STATE_PREPARING
        events = await collect(jobs, job.id)
        assert_gapless(events)
        assert states(events) == ["PREPARING", "QUEUED", "RUNNING", "SUCCEEDED"]
        assert [e.progress.step for e in events if e.HasField("progress")] == [1, 2, 3, 4, 5]
        ended = await jobs.get(job.id)
        assert ended.model == "peer:1"
        assert ended.attempt == 1
        assert ended.plan.total_steps == 5
        assert ended.last_event_number == len(events)
        assert ended.created.ToNanoseconds() < ended.started.ToNanoseconds() < ended.finished.ToNanoseconds()
        assert publisher.published == [job.id]
        assert jobs.snapshot().by_state == {"SUCCEEDED": 1}


async def test_a_model_that_is_published_and_cannot_be_loaded_is_told_by_a_notice(tmp_path: Path) -> None:
    async with open_jobs(tmp_path, publisher=FolderPublisher(not_loaded="no room on the device")) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=2))
        *_, published, notice, last = await collect(jobs, job.id)
        assert published.published.version == 1
        assert (notice.notice.code, notice.notice.message) == ("model-not-loaded", "no room on the device")
        assert notice.notice.severity == job_pb2.SEVERITY_WARNING
        assert last.state.state == JOB_STATE_SUCCEEDED


async def test_pause_frees_the_device_and_resume_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=LONG))
        await collect(jobs, job.id, until=at_step(5))
        answer = await jobs.control(job.id, PAUSE)
        assert answer.job.state == JOB_STATE_PAUSED
        events = await collect(jobs, job.id, until=in_state(JOB_STATE_PAUSED))
        done = events[answer.event_number - 1]
        assert done.command.command_id == answer.command_id
        assert not jobs.snapshot().running_by_device
        await jobs.control(job.id, RESUME)
        more = await collect(jobs, job.id, after=events[-1].number, until=at_step(1, attempt=2))
        paused_at = next(e.checkpoint.step for e in events if e.HasField("checkpoint"))
        assert more[-1].progress.step == paused_at + 1
        assert (await jobs.control(job.id, CANCEL)).job.state == JOB_STATE_CANCELLED
        assert states(await collect(jobs, job.id))[-1] == "CANCELLED"


async def test_a_running_job_obeys_a_checkpoint_command_and_refuses_resume(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=LONG))
        await collect(jobs, job.id, until=at_step(1))
        answer = await jobs.control(job.id, CHECKPOINT)
        assert answer.job.state == JOB_STATE_RUNNING
        with pytest.raises(JobStateError, match="RUNNING") as refused:
            await jobs.control(job.id, RESUME)
        assert refused.value.metadata["state"] == "RUNNING"
        await jobs.control(job.id, CANCEL)
        await collect(jobs, job.id)
        with pytest.raises(JobStateError, match="CANCELLED"):
            await jobs.control(job.id, PAUSE)


async def test_a_running_job_yields_on_command_and_as_the_daemon_tells_its_device(tmp_path: Path) -> None:
    def lines(events: list[job_pb2.JobEvent]) -> list[str]:
        return [event.log.message for event in events if event.HasField("log")]

    async with open_jobs(tmp_path) as jobs:
        on_mps = await create(jobs, peer_spec(tmp_path, "on-mps", steps=LONG, device="mps"))
        on_cuda = await create(jobs, peer_spec(tmp_path, "on-cuda", steps=LONG, device="cuda"))
        for job in (on_mps, on_cuda):
            await collect(jobs, job.id, until=at_step(1))
        assert (await jobs.control(on_mps.id, yield_for(60))).job.state == JOB_STATE_RUNNING
        jobs.yield_to_inference("mps", 0)  # does not cut short what a user asked for
        await jobs.control(on_mps.id, yield_for(0))
        for device, seconds in (("cuda:1", 9), ("cuda:0", 0.5), ("cuda:0", 0), ("mps", 0.25)):
            jobs.yield_to_inference(device, seconds)
        seen = [
            await collect(jobs, job.id, until=lambda event, last=last: event.log.message == last)
            for job, last in ((on_mps, "yields 0.25 s"), (on_cuda, "yields 0 s"))
        ]
        assert [lines(events) for events in seen] == [["yields 0.25 s"], ["yields 0.5 s", "yields 0 s"]]
        commands = [[e.command.command for e in events if e.HasField("command")] for events in seen]
        assert commands == [["yield_to_inference"] * 2, []]
        queued = await create(jobs, peer_spec(tmp_path, "queued", steps=LONG, device="mps"))
        await collect(jobs, queued.id, until=in_state(JOB_STATE_QUEUED))
        with pytest.raises(JobStateError, match="QUEUED, which allows cancel, pause"):
            await jobs.control(queued.id, yield_for(1))


async def test_a_killed_trainer_is_retried_from_its_checkpoint(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=LONG))
        await collect(jobs, job.id, until=at_step(5))
        await jobs.control(job.id, CHECKPOINT)
        os.kill(trainer_pid(tmp_path, job.id), signal.SIGKILL)
        events = await collect(jobs, job.id, until=at_step(1, attempt=2))
        assert_gapless(events)
        assert states(events) == ["PREPARING", "QUEUED", "RUNNING", "QUEUED", "RUNNING"]
        notice = next(e.notice for e in events if e.HasField("notice"))
        assert "SIGKILL" in notice.message
        assert "run attempt 1" in notice.message
        saved = next(e.checkpoint.step for e in events if e.HasField("checkpoint"))
        assert events[-1].progress.step == saved + 1
        await jobs.control(job.id, CANCEL)


async def test_a_trainer_that_always_crashes_fails_with_the_end_of_its_log(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        spec = peer_spec(tmp_path, "crashes")
        spec.resources.max_retries = 1
        job = await create(jobs, spec)
        events = await collect(jobs, job.id)
        assert states(events) == ["PREPARING", "QUEUED", "RUNNING", "QUEUED", "RUNNING", "FAILED"]
        assert events[-1].state.error.reason == "InternalError"
        assert "crashed 2 times" in events[-1].state.error.message
        assert "dies at step 3" in events[-1].state.error.message


async def test_a_trainer_that_ignores_cancel_is_killed(tmp_path: Path) -> None:
    async with open_jobs(tmp_path, cancel_grace_s=0.3) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=LONG))
        await collect(jobs, job.id, until=at_step(1))
        os.kill(trainer_pid(tmp_path, job.id), signal.SIGSTOP)
        answer = await jobs.control(job.id, CANCEL)
        events = await collect(jobs, job.id)
        assert states(events)[-1] == "CANCELLED"
        assert events[answer.event_number - 1].command.command == "cancel"


async def test_a_trainer_that_agrees_to_pause_and_stays_is_told_to_the_caller(tmp_path: Path) -> None:
    async with open_jobs(tmp_path, settle_s=0.3) as jobs:
        job = await create(jobs, peer_spec(tmp_path, "lingers", steps=LONG))
        await collect(jobs, job.id, until=at_step(1))
        with pytest.raises(DeadlineExceededError, match=r"accepted the pause .* still RUNNING"):
            await jobs.control(job.id, PAUSE)
        await jobs.control(job.id, CANCEL)
        assert states(await collect(jobs, job.id))[-1] == "CANCELLED"


async def test_jobs_of_one_device_run_one_after_the_other_in_order(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        first = await create(jobs, peer_spec(tmp_path, "first", steps=LONG))
        await collect(jobs, first.id, until=in_state(JOB_STATE_RUNNING))
        second = await create(jobs, peer_spec(tmp_path, "second", steps=5))
        third = await create(jobs, peer_spec(tmp_path, "third", steps=5))
        await collect(jobs, third.id, until=in_state(JOB_STATE_QUEUED))
        assert [(await jobs.get(job.id)).queue_position for job in (first, second, third)] == [0, 1, 2]
        other = await create(jobs, peer_spec(tmp_path, "other", steps=5, device="mps"))
        assert states(await collect(jobs, other.id))[-1] == "SUCCEEDED"
        assert (await jobs.get(second.id)).state == JOB_STATE_QUEUED
        await jobs.control(first.id, CANCEL)
        await collect(jobs, third.id)
        ends = [(await jobs.get(job.id)) for job in (first, second, third)]
        assert ends[0].finished.ToNanoseconds() < ends[1].started.ToNanoseconds()
        assert ends[1].finished.ToNanoseconds() <= ends[2].started.ToNanoseconds() + 50_000_000


async def test_a_queued_job_can_be_paused_resumed_and_cancelled_without_a_trainer(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        first = await create(jobs, peer_spec(tmp_path, "first", steps=LONG))
        job = await create(jobs, peer_spec(tmp_path, "waits", steps=5))
        await collect(jobs, job.id, until=in_state(JOB_STATE_QUEUED))
        for command, state in ((PAUSE, JOB_STATE_PAUSED), (RESUME, JOB_STATE_QUEUED)):
            assert (await jobs.control(job.id, command)).job.state == state
        answer = await jobs.control(job.id, CANCEL)
        assert answer.job.state == JOB_STATE_CANCELLED
        events = await collect(jobs, job.id)
        assert states(events) == ["PREPARING", "QUEUED", "PAUSED", "QUEUED", "CANCELLED"]
        assert (await jobs.get(first.id)).state in (JOB_STATE_QUEUED, JOB_STATE_RUNNING)
        await jobs.delete(job.id)
        with pytest.raises(JobNotFoundError):
            await jobs.get(job.id)
        with pytest.raises(JobStateError, match="only an ended one"):
            await jobs.delete(first.id)


async def test_fifty_watchers_see_every_event_once_from_any_number(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=400))
        watches = [asyncio.create_task(collect(jobs, job.id, after=3 * n)) for n in range(50)]
        await collect(jobs, job.id, until=at_step(300))
        assert jobs.snapshot().watchers == 50
        late = asyncio.create_task(collect(jobs, job.id, after=1))
        everything = await collect(jobs, job.id)
        assert_gapless(everything)
        assert await late == everything[1:]
        for n, watch in enumerate(watches):
            assert await watch == everything[3 * n :]
        assert await collect(jobs, job.id, after=everything[-2].number) == everything[-1:]


async def test_validate_only_returns_the_plan_and_keeps_nothing(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=7), validate_only=True)
        assert job.plan.total_steps == 7
        assert list((tmp_path / "home" / "jobs").iterdir()) == []
        assert not (await jobs.list(training_pb2.ListJobsRequest())).jobs
        with pytest.raises(JobNotFoundError):
            await jobs.get(job.id)


async def test_a_validation_whose_caller_leaves_is_cleared_away(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        with pytest.raises(TimeoutError):
            # A process does not start in this time.
            await asyncio.wait_for(create(jobs, peer_spec(tmp_path), validate_only=True), 0.1)
    assert list((tmp_path / "home" / "jobs").iterdir()) == []


async def test_the_same_idempotency_key_returns_the_same_job_also_after_a_restart(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        spec = peer_spec(tmp_path, steps=3)
        made = await asyncio.gather(*(create(jobs, spec, idempotency_key="k") for _ in range(5)))
        assert len({job.id for job in made}) == 1
        await collect(jobs, made[0].id)
    (tmp_path / "data.csv").rename(tmp_path / "gone.csv")  # what is there already needs no data
    async with open_jobs(tmp_path) as jobs:
        assert (await create(jobs, spec, idempotency_key="k")).id == made[0].id
        with pytest.raises(DataError):
            await create(jobs, spec, idempotency_key="another")


async def test_wrong_specs_and_paths_outside_the_roots_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "allowed"
    root.mkdir()
    async with open_jobs(root) as jobs:
        spec = peer_spec(root)
        spec.train.schedule = "sawtooth"
        with pytest.raises(SpecError, match="cosine"):
            await create(jobs, spec)
        outside = tmp_path / "secret.csv"
        outside.write_text("image,caption\n")
        link = root / "link.csv"
        link.symlink_to(outside)
        for path in (outside, link, root / ".." / "secret.csv", Path("/etc/passwd")):
            spec = peer_spec(root)
            spec.data.train = str(path)
            with pytest.raises(PathOutsideRootsError, match="outside"):
                await create(jobs, spec)
        spec = peer_spec(root)
        spec.model.name = "local-dir:/etc"
        with pytest.raises(PathOutsideRootsError):
            await create(jobs, spec)
        spec = peer_spec(root)
        spec.data.train = str(root / "missing.csv")
        with pytest.raises(DataError, match=r"missing\.csv"):
            await create(jobs, spec)
        for unusable in ("x" * 5000, "a\0b", "~nobody-of-this-name/x.csv"):
            for field in ("train", "validation", "image_root"):
                spec = peer_spec(root)
                setattr(spec.data, field, unusable)
                with pytest.raises(DataError, match=f"data.{field}: .* is no usable path"):
                    await create(jobs, spec)
        assert list((root / "home" / "jobs").iterdir()) == []


async def test_lists_are_paged_newest_first_and_filtered_by_state(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        made = [(await create(jobs, peer_spec(tmp_path, f"j{n}", steps=LONG))).id for n in range(5)]
        for job_id in made[1:4]:
            await jobs.control(job_id, CANCEL)
            await collect(jobs, job_id)
        listed: list[str] = []
        token = ""
        while True:
            page = await jobs.list(training_pb2.ListJobsRequest(page_size=2, page_token=token))
            listed += [job.id for job in page.jobs]
            token = page.next_page_token
            if not token:
                break
        assert listed == made[::-1]
        cancelled = await jobs.list(training_pb2.ListJobsRequest(states=[JOB_STATE_CANCELLED]))
        assert [job.id for job in cancelled.jobs] == made[3:0:-1]
        for request in (
            training_pb2.ListJobsRequest(page_size=-1),
            training_pb2.ListJobsRequest(page_token="nonsense"),
            training_pb2.ListJobsRequest(page_token=base64.b64encode(b"9" * 30 + b" x").decode()),
        ):
            with pytest.raises(InvalidInputError):
                await jobs.list(request)


async def test_a_stop_suspends_the_trainer_and_the_next_start_goes_on(tmp_path: Path) -> None:
    async def watched(jobs: Jobs, job_id: str) -> list[job_pb2.JobEvent]:
        seen = []
        try:
            async for event in jobs.watch(job_id):
                seen.append(event)
        except UnavailableError:
            return seen
        raise AssertionError("the watch ended without saying that the daemon stops")

    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, "runs", steps=400))
        waiting = await create(jobs, peer_spec(tmp_path, "waits", steps=5))
        await collect(jobs, job.id, until=at_step(5))
        watch = asyncio.create_task(watched(jobs, job.id))
    seen = await watch
    assert states(seen)[-1] == "QUEUED"
    with pytest.raises(UnavailableError):
        await create(jobs, peer_spec(tmp_path))
    with pytest.raises(UnavailableError):
        await jobs.delete(job.id)
    async with open_jobs(tmp_path) as jobs:
        more = await collect(jobs, job.id, after=seen[-1].number)
        assert_gapless(seen + more)
        steps = [e.progress.step for e in seen + more if e.HasField("progress")]
        assert steps == list(range(1, 401))
        assert states(more) == ["RUNNING", "SUCCEEDED"]
        assert not any(e.HasField("notice") for e in seen + more)
        assert states(await collect(jobs, waiting.id))[-1] == "SUCCEEDED"
        ended, waited = await jobs.get(job.id), await jobs.get(waiting.id)
        assert ended.finished.ToNanoseconds() <= waited.started.ToNanoseconds() + 50_000_000


async def test_a_deleted_database_is_rebuilt_and_a_damaged_folder_is_left_out(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        kept = await create(jobs, peer_spec(tmp_path, "kept", steps=3))
        damaged = await create(jobs, peer_spec(tmp_path, "damaged", steps=3))
        await collect(jobs, kept.id)
        await collect(jobs, damaged.id)
        before = await jobs.get(kept.id)
    home = tmp_path / "home"
    for path in home.glob("cliptune.db*"):
        path.unlink()
    (home / "jobs" / damaged.id / "job.json").write_text("{")
    (home / "jobs" / ".new-leftover").mkdir()
    async with open_jobs(tmp_path) as jobs:
        listed = (await jobs.list(training_pb2.ListJobsRequest())).jobs
        assert list(listed) == [before]
        assert jobs.snapshot().by_state == {"SUCCEEDED": 1}
    assert not (home / "jobs" / ".new-leftover").exists()
    assert (home / "jobs" / damaged.id).exists()


async def test_a_preparation_can_be_cancelled(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path))
        answer = await jobs.control(job.id, CANCEL)
        assert answer.job.state in (JOB_STATE_CANCELLED, JOB_STATE_FAILED, JOB_STATE_SUCCEEDED)
        assert states(await collect(jobs, job.id)) == ["PREPARING", "CANCELLED"]
        assert JOB_STATE_SUCCEEDED not in (answer.job.state,)


async def test_a_replay_of_an_ended_job_that_a_stop_cuts_off_says_so(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=400))
        assert len(await collect(jobs, job.id)) > 300  # more than a replay reads at once
    async with open_jobs(tmp_path) as jobs:
        replay = jobs.watch(job.id)
        await anext(replay)
    with pytest.raises(UnavailableError, match="stopping"):
        async for _ in replay:
            pass


async def test_what_the_daemon_logs_of_a_job_names_it(tmp_path: Path) -> None:
    named: list[tuple[str, object]] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            named.append((record.getMessage(), structlog.contextvars.get_contextvars().get("job_id")))

    logger = logging.getLogger("cliptune_server.training.dispatcher")
    collector, level = Collector(), logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        async with open_jobs(tmp_path) as jobs:
            made = [(await create(jobs, peer_spec(tmp_path, name, steps=2))).id for name in ("a", "b")]
            for job_id in made:
                await collect(jobs, job_id)
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
    assert {job_id for _, job_id in named} == set(made)
    assert all(str(job_id) in message for message, job_id in named)
