"""A job heeds what `cliptune doctor` proved of its machine: the home's proofs narrow its plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cliptune.errors import InvalidInputError
from cliptune.internal.v1 import trainer_pb2
from cliptune_model.machine.hardware import detect
from cliptune_model.machine.proofs import Proof, Proofs, save_proofs
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.training.run import run
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob

SHORT = {"epochs": 1, "batch_size": 8, "max_steps": 2}


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


def found_broken(home: Path, *names: str) -> None:
    found = {name: Proof(holds=False, told="relative difference 0.4") for name in names}
    save_proofs(home, "cpu", detect("cpu"), Proofs(found=found))


def prepared(job: TrainerJob) -> None:
    journal = Journal(job.folder.journal(0), 0)
    try:
        prepare(job.folder, [job.root], Reporter(journal))
    finally:
        journal.close()


def losses(job: TrainerJob) -> list[float]:
    journal = Journal(job.folder.journal(1), 1)
    try:
        ending = run(job.folder, [job.root], Reporter(journal), Inbox(), linked=False)
    finally:
        journal.close()
    assert ending.outcome == trainer_pb2.OUTCOME_SUCCEEDED
    return [values[0] for values in job.losses(1).values()]


def test_broken_attention_and_optimiser_are_replaced_and_the_job_learns_the_same(
    make_job: MakeJob, tmp_path: Path
) -> None:
    free = losses(make_job("free/jobs/1", train=SHORT))
    job = make_job("home/jobs/1", train=SHORT)
    found_broken(tmp_path / "home", "sdpa attention", "fused optimiser")
    prepared(job)
    plan = next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))
    assert plan.attention == "sliced"
    reasons = {decision.subject: decision.reason for decision in plan.decisions}
    assert "broken by doctor" in reasons["attention"]
    assert "doctor" in reasons["fused_optimizer"]
    assert losses(job) == pytest.approx(free, rel=1e-4)


def test_a_precision_that_was_found_broken_is_refused_before_the_job_starts(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job("home/jobs/1", train={**SHORT, "precision": "bf16"})
    found_broken(tmp_path / "home", "bf16")
    with pytest.raises(InvalidInputError, match="cliptune doctor found it broken") as caught:
        prepared(job)
    assert caught.value.metadata["allowed"] == "auto, fp32, fp16"


def test_checkpointing_that_was_found_broken_is_not_turned_on(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("home/jobs/1", train={**SHORT, "checkpointing": "on"})
    found_broken(tmp_path / "home", "checkpointing")
    with pytest.raises(InvalidInputError, match="use 'off'"):
        prepared(job)
