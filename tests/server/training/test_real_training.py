"""Jobs with the real trainer: a tiny model learns, is published, survives a kill with the same bits."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import pytest

from cliptune.errors import DiskFullError, MissingColumnError
from cliptune.v1 import job_pb2, spec_pb2
from cliptune_server.catalog.model_files import ModelFiles
from cliptune_server.catalog.models import Models
from cliptune_server.catalog.registry import Registry
from cliptune_server.database import Database
from cliptune_server.inference.engine_process import EngineConfig
from cliptune_server.inference.engines import EngineSupervisor
from cliptune_server.training.job_folder import JobFolder
from tests.server.training.house import assert_gapless, collect, create, in_state, open_jobs, states
from tests.support.datasets import Shapes, write_shapes

TRAINER = (sys.executable, "-m", "cliptune_trainer")


def real_spec(shapes: Shapes, name: str, *, steps: int) -> spec_pb2.JobSpec:
    spec = spec_pb2.JobSpec(name=name)
    spec.model.name = "cliptune-test-vit"
    spec.data.train = str(shapes.csv)
    spec.data.label_column = "label"
    spec.data.split_column = "split"
    spec.train.max_steps = steps
    spec.train.batch_size = 6
    spec.train.precision = "fp32"
    spec.checkpoint.every_steps = 2
    spec.evaluation.every_epochs = 0
    spec.publish.serve = False
    spec.resources.device = "cpu"
    spec.resources.threads = 1
    return spec


def losses(events: list[job_pb2.JobEvent]) -> dict[int, float]:
    """Step → loss of the highest attempt that made the step."""
    return {event.progress.step: event.progress.loss for event in events if event.HasField("progress")}


async def test_a_trainer_killed_and_resumed_gives_the_same_losses_bit_for_bit_and_a_published_model(
    tmp_path: Path,
) -> None:
    shapes = write_shapes(tmp_path / "shapes")
    registry_path = tmp_path / "registry"
    files = ModelFiles(registry_path / "models")
    files.root.mkdir(parents=True)
    database = Database.open(registry_path / "index.db")
    models = Models(
        registry=Registry(files, database),
        engines=EngineSupervisor(EngineConfig(device="cpu", threads=1)),
        serving_path=registry_path / "serving.json",
    )
    await models.start()
    try:
        async with open_jobs(tmp_path, command=TRAINER, publisher=models) as jobs:
            plain = await create(jobs, real_spec(shapes, "plain", steps=8))
            uninterrupted = await collect(jobs, plain.id)
            assert states(uninterrupted) == ["PREPARING", "QUEUED", "RUNNING", "SUCCEEDED"]

            job = await create(jobs, real_spec(shapes, "killed", steps=8))
            seen = await collect(jobs, job.id, until=lambda event: event.checkpoint.step >= 4)
            note = JobFolder(tmp_path / "home" / "jobs" / job.id).launch_note()
            assert note is not None
            os.kill(note.pid, signal.SIGKILL)
            events = seen + await collect(jobs, job.id, after=seen[-1].number)
            assert_gapless(events)
            assert states(events) == ["PREPARING", "QUEUED", "RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]
            assert losses(events) == losses(uninterrupted)
            resumed = [e.progress.step for e in events if e.attempt == 2 and e.HasField("progress")]
            assert resumed[0] > 1

            ended = await jobs.get(job.id)
            assert ended.model == "killed:1"
            published = files.root / "killed" / "1"
            assert (published / "open_clip_model.safetensors").is_file()
            assert ended.evaluation.occasion == "after"
    finally:
        await models.stop()
        database.close()


async def test_a_running_trainer_obeys_every_command(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "shapes")
    async with open_jobs(tmp_path, command=TRAINER) as jobs:
        job = await create(jobs, real_spec(shapes, "commanded", steps=100_000))
        await collect(jobs, job.id, until=lambda event: event.progress.step >= 1)
        rate = job_pb2.SetLearningRateCommand(learning_rate=1e-6)
        for command in (
            job_pb2.JobCommand(checkpoint=job_pb2.CheckpointCommand()),
            job_pb2.JobCommand(evaluate=job_pb2.EvaluateCommand()),
            job_pb2.JobCommand(set_learning_rate=rate),
            job_pb2.JobCommand(pause=job_pb2.PauseCommand()),
        ):
            answer = await jobs.control(job.id, command)
            events = await collect(
                jobs, job.id, until=lambda event, last=answer.event_number: event.number == last
            )
            assert events[-1].command.command_id == answer.command_id
        assert any(event.evaluation.occasion == "requested" for event in events)
        paused = await collect(jobs, job.id, until=in_state(job_pb2.JOB_STATE_PAUSED))
        assert_gapless(paused)
        answer = await jobs.control(job.id, job_pb2.JobCommand(cancel=job_pb2.CancelCommand()))
        assert answer.job.state == job_pb2.JOB_STATE_CANCELLED


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes another process's limit")
async def test_a_full_disk_pauses_the_job_in_memory_and_a_resume_loses_nothing(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "shapes")
    # Files of at most 64 KiB: the journal fits, a checkpoint does not.
    limited = ("bash", "-c", f'ulimit -S -f 64; exec {sys.executable} -m cliptune_trainer "$@"', "trainer")
    async with open_jobs(tmp_path, command=limited) as jobs:
        job = await create(jobs, real_spec(shapes, "full", steps=4))
        events = await collect(jobs, job.id, until=in_state(job_pb2.JOB_STATE_PAUSED))
        assert events[-1].state.error.reason == "DiskFullError"
        assert (await jobs.get(job.id)).error.reason == "DiskFullError"
        assert jobs.snapshot().running_by_device == {"cpu": 1}
        resume = job_pb2.JobCommand(resume=job_pb2.ResumeCommand())
        with pytest.raises(DiskFullError):
            await jobs.control(job.id, resume)
        note = JobFolder(tmp_path / "home" / "jobs" / job.id).launch_note()
        assert note is not None
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(note.pid, resource.RLIMIT_FSIZE, unlimited)
        assert (await jobs.control(job.id, resume)).job.state == job_pb2.JOB_STATE_RUNNING
        events = await collect(jobs, job.id)
        assert_gapless(events)
        assert states(events) == ["PREPARING", "QUEUED", "RUNNING", "PAUSED", "RUNNING", "SUCCEEDED"]
        assert [event.progress.step for event in events if event.HasField("progress")] == [1, 2, 3, 4]


async def test_a_validation_with_a_missing_column_raises_the_trainers_own_error(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "shapes")
    async with open_jobs(tmp_path, command=TRAINER) as jobs:
        spec = real_spec(shapes, "wrong", steps=2)
        spec.data.caption_column = "text"
        with pytest.raises(MissingColumnError, match="caption") as refused:
            await create(jobs, spec, validate_only=True)
        assert refused.value.metadata["column"] == "text"
