"""Real trainer processes: killed, stopped, told, cut off, out of disk."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_model.exported import load_exported, read_manifest
from tests.trainer.conftest import MakeJob
from tests.trainer.daemon import LinkServer
from tests.trainer.jobs import TIMEOUT_S, TrainerJob

PATIENT = {"train": {"epochs": 400, "batch_size": 8, "learning_rate": 1e-4}}


@pytest.fixture(scope="module")
def reference() -> dict[str, TrainerJob]:
    """The uninterrupted run that others are compared with, made by the first test that needs it."""
    return {}


def uninterrupted(reference: dict[str, TrainerJob], make_job: MakeJob) -> TrainerJob:
    if "job" not in reference:
        job = make_job("reference")
        traced = {
            "TRACEPARENT": f"00-{'ab' * 16}-{'cd' * 8}-01",
            "OTEL_TRACES_EXPORTER": "console",
            "OTEL_SDK_DISABLED": "false",
        }
        job.run("prepare", 0)
        job.run("run", 1, env=traced)
        reference["job"] = job
    return reference["job"]


def test_a_job_is_prepared_and_trained_without_any_daemon(
    reference: dict[str, TrainerJob], make_job: MakeJob
) -> None:
    job = uninterrupted(reference, make_job)
    assert job.outcome(0).outcome == trainer_pb2.OUTCOME_PREPARED
    plan = next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))
    assert (plan.train_samples, plan.validation_samples) == (54, 6)
    assert (plan.batch_size, plan.steps_per_epoch, plan.total_steps) == (8, 6, 30)
    assert plan.parameters > 1_000_000
    assert plan.estimated_memory_bytes > plan.parameters * 16
    assert plan.estimated_seconds > 0
    assert {decision.subject for decision in plan.decisions} >= {"device", "precision", "threads", "classes"}

    ending = job.outcome(1)
    assert (ending.outcome, ending.export_path) == (trainer_pb2.OUTCOME_SUCCEEDED, "export")
    assert [event.sequence for event in job.journal(1)] == list(range(1, len(job.journal(1)) + 1))
    occasions = [
        event.event.evaluation.occasion for event in job.journal(1) if event.event.HasField("evaluation")
    ]
    assert occasions == ["before", "during", "during", "during", "during", "after"]
    progress = [event.event.progress for event in job.journal(1) if event.event.HasField("progress")]
    assert [entry.step for entry in progress] == list(range(1, 31))
    assert progress[-1].epoch == 5.0
    assert progress[-1].loss < progress[0].loss
    assert all(entry.samples_per_second > 0 and entry.device_memory_bytes > 0 for entry in progress)

    manifest = read_manifest(job.path / "export")
    assert manifest.metrics["zero_shot/balanced_accuracy"] > 0.5
    with torch.no_grad():
        tokens = load_exported(job.path / "export").encode_texts(torch.zeros(1, 16, dtype=torch.int64))
    assert tokens.shape == (1, 32)


def test_the_trainers_spans_continue_the_trace_that_it_was_handed(
    reference: dict[str, TrainerJob], make_job: MakeJob
) -> None:
    log = uninterrupted(reference, make_job).log
    for name in ("job.run", "train.epoch", "evaluate", "checkpoint", "export"):
        assert f'"name": "{name}"' in log
    assert f'"parent_id": "0x{"cd" * 8}"' in log
    traces = {line.split('"')[3] for line in log.splitlines() if line.strip().startswith('"trace_id": "0x')}
    assert traces == {"0x" + "ab" * 16}


def test_losses_after_a_kill_in_mid_epoch_equal_the_uninterrupted_runs_bit_for_bit(
    reference: dict[str, TrainerJob], make_job: MakeJob, daemon: LinkServer
) -> None:
    whole = uninterrupted(reference, make_job).losses(1)
    job = make_job("killed")
    process = job.start("run", 1, link=daemon.target)
    daemon.wait(lambda event: event.event.checkpoint.step == 8)
    process.kill()
    process.wait(TIMEOUT_S)
    before = job.losses(1)
    assert max(before) < 30, "killed too late to prove anything"

    job.run("run", 2)
    after = job.losses(2)
    assert min(after) - 1 in (8, 12, 16, 20, 24, 28)
    assert (min(after) - 1) % 6, "the resume is not in mid-epoch"
    assert max(after) == 30
    assert before == {step: whole[step] for step in before}
    assert after == {step: whole[step] for step in after}
    exported = [
        (job_.path / "export" / "open_clip_model.safetensors").read_bytes()
        for job_ in (job, reference["job"])
    ]
    assert exported[0] == exported[1]


def test_commands_are_carried_out_and_answered_and_a_lost_link_comes_back(
    make_job: MakeJob, socket: Path
) -> None:
    job = make_job(**PATIENT)
    with LinkServer(socket) as daemon:
        process = job.start("run", 1, link=daemon.target)
        daemon.wait_hello()
        hello = daemon.hellos[0]
        assert (hello.job_id, hello.secret, hello.attempt) == ("job", "secret", 1)
        daemon.wait_step(1)

        assert not daemon.wait_done(daemon.tell(checkpoint=job_pb2.CheckpointCommand())).HasField("error")
        assert not daemon.wait_done(daemon.tell(evaluate=job_pb2.EvaluateCommand())).HasField("error")
        done = daemon.wait_done(daemon.tell(resume=job_pb2.ResumeCommand()))
        assert done.error.reason == "JobStateError"
        wrong = job_pb2.SetLearningRateCommand(learning_rate=-1.0)
        assert daemon.wait_done(daemon.tell(set_learning_rate=wrong)).error.reason == "SpecError"
        faster = job_pb2.SetLearningRateCommand(learning_rate=2e-4)
        changed = daemon.tell(set_learning_rate=faster)
        assert not daemon.wait_done(changed).HasField("error")
        daemon.tell_again(changed, set_learning_rate=faster)
        seen = len(daemon.events)

    # The daemon is gone; training goes on, and the next daemon is found on the same socket.
    with LinkServer(socket) as daemon:
        daemon.wait_hello()
        assert daemon.hellos[0].last_sequence >= seen
        daemon.wait(lambda event: event.event.HasField("progress"))
        first = daemon.events[0]
        assert first.sequence == daemon.hellos[0].last_sequence + 1, "an event was lost or told twice"
        paused = daemon.tell(pause=job_pb2.PauseCommand())
        assert not daemon.wait_done(paused).HasField("error")
        daemon.wait(lambda event: event.HasField("finished"))
        assert process.wait(TIMEOUT_S) == 0

    assert job.outcome(1).outcome == trainer_pb2.OUTCOME_PAUSED
    journal = job.journal(1)
    answered = [event.event.command.command_id for event in journal if event.event.HasField("command")]
    assert len(answered) == len(set(answered)) == 6, "a command that came twice was carried out twice"
    evaluations = [event.event.evaluation for event in journal if event.event.HasField("evaluation")]
    assert evaluations[1].occasion == "requested"
    stopped_at = max(job.losses(1))

    # Resumed where it was, with the new peak; then the machine stops, then the job is cancelled.
    with LinkServer(socket) as daemon:
        process = job.start("run", 2, link=daemon.target)
        daemon.wait_step(1, attempt=2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        assert min(job.losses(2)) == stopped_at + 1
        assert job.outcome(2).outcome == trainer_pb2.OUTCOME_SUSPENDED
        assert "checkpoint" in job.kinds(2)
        peaks = {round(event.event.progress.learning_rate, 6) for event in job.journal(2)}
        assert max(peaks) <= 2e-4

        process = job.start("run", 3, link=daemon.target)
        daemon.wait_step(1, attempt=3)
        assert min(job.losses(3)) == max(job.losses(2)) + 1
        daemon.wait_done(daemon.tell(cancel=job_pb2.CancelCommand()))
        assert process.wait(TIMEOUT_S) == 0
    assert job.outcome(3).outcome == trainer_pb2.OUTCOME_CANCELLED
    assert job.kinds(3)[-2:] == ["command", "finished"]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's prlimit to fill the disk at will")
def test_a_full_disk_pauses_the_job_and_nothing_is_lost(
    reference: dict[str, TrainerJob], make_job: MakeJob, daemon: LinkServer
) -> None:
    whole = uninterrupted(reference, make_job).losses(1)
    job = make_job("full")
    process = job.start("run", 1, link=daemon.target)
    unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    # A checkpoint does not fit, the journal does.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
    paused = daemon.wait(lambda event: event.event.state.state == job_pb2.JOB_STATE_PAUSED).event.state
    assert paused.error.reason == "DiskFullError"
    assert not [entry for entry in (job.path / "checkpoints").iterdir() if entry.name.startswith("step-")]

    assert daemon.wait_done(daemon.tell(resume=job_pb2.ResumeCommand())).error.reason == "DiskFullError"
    evaluated = daemon.wait_done(daemon.tell(evaluate=job_pb2.EvaluateCommand()))
    assert (evaluated.error.reason, evaluated.error.metadata["state"]) == ("JobStateError", "PAUSED")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert not daemon.wait_done(daemon.tell(resume=job_pb2.ResumeCommand())).HasField("error")
    assert process.wait(TIMEOUT_S) == 0
    assert job.outcome(1).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert job.losses(1) == whole
    states = [event.event.state.state for event in job.journal(1) if event.event.HasField("state")]
    assert states == [job_pb2.JOB_STATE_PAUSED, job_pb2.JOB_STATE_RUNNING]


def test_a_second_trainer_on_the_same_job_is_refused(make_job: MakeJob) -> None:
    import fcntl

    job = make_job()
    descriptor = os.open(job.path / "trainer.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert job.start("run", 1).wait(TIMEOUT_S) == 1
        assert "another trainer is at work" in job.log
        assert not job.folder.journal(1).exists()
    finally:
        os.close(descriptor)
