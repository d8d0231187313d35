"""Jobs with every kind of loss, prepared and run in this process."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.errors import SpecError
from cliptune.internal.v1 import trainer_pb2
from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.training.run import run
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob

SHORT = {"epochs": 1, "batch_size": 8}
EVERYTHING: dict[str, Any] = {
    "terms": [
        {"name": "multi_positive", "parameters": {"labels": 1.0}},
        {"name": "hard_caption", "weight": 0.5},
        {"name": "distillation", "weight": 2.0},
    ],
    "weighting": "uncertainty",
    "matryoshka_dims": [16],
    "max_logit_scale": 40.0,
}


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pretrained(clip: Clip, tmp_path: Path) -> str:
    folder = tmp_path / "pretrained"
    export_model(clip, folder, manifest_of(clip))
    return f"local-dir:{folder}"


def prepared(job: TrainerJob) -> None:
    journal = Journal(job.folder.journal(0), 0)
    try:
        prepare(job.folder, [job.root], Reporter(journal))
    finally:
        journal.close()


def trained(job: TrainerJob, attempt: int = 1) -> None:
    journal = Journal(job.folder.journal(attempt), attempt)
    try:
        ending = run(job.folder, [job.root], Reporter(journal), Inbox(), linked=False)
    finally:
        journal.close()
    assert ending.outcome == trainer_pb2.OUTCOME_SUCCEEDED


def decisions(job: TrainerJob) -> dict[str, tuple[str, str]]:
    plan = next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))
    return {item.subject: (item.choice, item.reason) for item in plan.decisions}


def test_a_composed_loss_with_all_it_can_need_trains_and_resumes_to_the_bit(
    make_job: MakeJob, pretrained: str
) -> None:
    job = make_job(
        model={"name": pretrained},
        loss=EVERYTHING,
        train={"epochs": 1, "batch_size": 8, "micro_batch_size": 3},
        checkpoint={"every_steps": 5, "keep": 9},
    )
    prepared(job)
    found = decisions(job)
    assert found["logit_scale"][1].endswith("learned, from 1 to 40")
    assert found["loss tiling"][0] == "off"
    assert "'hard_caption' must have all logits at once" in found["loss tiling"][1]
    trained(job)
    whole = job.losses(1)
    assert len(whole) == 6
    told = job.notices(1)["loss-weights"]
    assert re.fullmatch(
        r"learned weights: multi_positive [\d.]+, hard_caption [\d.]+, distillation [\d.]+", told
    )
    shutil.rmtree(job.folder.checkpoints / "step-00000006")
    shutil.rmtree(job.folder.export)
    trained(job, 2)
    assert job.losses(2) == {step: numbers for step, numbers in whole.items() if step > 5}
    assert job.notices(2)["loss-weights"] == told


def test_a_teacher_is_the_starting_model_also_after_a_resume(make_job: MakeJob, pretrained: str) -> None:
    job = make_job(
        model={"name": pretrained},
        loss={"name": "distillation"},
        train={"epochs": 1, "batch_size": 8, "learning_rate": 1e-5},
        checkpoint={"every_steps": 5, "keep": 9},
    )
    trained(job)
    first, *later = (numbers[0] for numbers in job.losses(1).values())
    assert first == pytest.approx(0.0, abs=1e-5)  # the student is the teacher still
    assert max(later) < 0.01  # and with nothing else to learn it stays where it is
    shutil.rmtree(job.folder.checkpoints / "step-00000006")
    shutil.rmtree(job.folder.export)
    trained(job, 2)
    assert job.losses(2)[6] == job.losses(1)[6]


def test_a_fixed_temperature_is_exported_as_it_was_asked_for(make_job: MakeJob) -> None:
    job = make_job(loss={"temperature": "fixed", "logit_scale": 12.5}, train=SHORT)
    prepared(job)
    assert decisions(job)["logit_scale"] == ("12.5", "asked for; it stays")
    trained(job)
    assert [numbers[2] for numbers in job.losses(1).values()] == pytest.approx([12.5] * 6, rel=1e-6)
    assert load_exported(job.folder.export).logit_scale == pytest.approx(12.5, rel=1e-6)


def test_a_global_temperature_and_a_learned_similarity_train_together(make_job: MakeJob) -> None:
    job = make_job(
        model={"similarity": "lorentz"}, loss={"temperature": "global"}, train={**SHORT, "clip_norm": 0.0}
    )
    prepared(job)
    trained(job)
    assert len(job.losses(1)) == 6
    assert load_exported(job.folder.export).similarity.name == "lorentz"


@pytest.mark.parametrize(
    ("loss", "path", "allowed"),
    [
        ({"name": "soft_target"}, "data.label_column", "labels"),
        ({"name": "multi_positive", "parameters": {"labels": 1}}, "data.label_column", "labels"),
        ({"matryoshka_dims": [4096]}, "loss.matryoshka_dims[0]", "fewer than the embedding's"),
        ({"name": "margin", "tiling": "on"}, "loss.tiling", "auto, off"),
    ],
)
def test_a_loss_without_what_it_needs_is_refused_in_preparation(
    make_job: MakeJob, loss: dict[str, Any], path: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        prepared(make_job(data={"label_column": ""}, loss=loss, train=SHORT))
    assert caught.value.metadata["path"] == path
    assert allowed in caught.value.metadata["allowed"]


def test_captions_that_cannot_be_made_wrong_are_refused_or_told(
    make_job: MakeJob, tiles: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tiles, tmp_path / "data")

    def table(captions: list[str]) -> dict[str, str]:
        with (data / "short.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption", "label"])
            writer.writerows(
                [f"{row}.png", captions[row % len(captions)], "x" * (row % 2)] for row in range(60)
            )
        return {"train": str(data / "short.csv")}

    def job(name: str, captions: list[str], loss: str) -> TrainerJob:
        return make_job(name, root=data, data=table(captions), loss={"name": loss}, train=SHORT)

    with pytest.raises(SpecError, match="no caption can be made wrong"):
        prepared(job("none", ["tile", "a tile"], "hard_caption"))
    some = job("some", ["tile", "a red tile"], "hard_caption")
    prepared(some)
    assert "2 distinct captions in batches of 8: hard_caption" in some.notices(0)["repeated-captions"]
    assert " captions cannot be made wrong" in some.notices(0)["captions-without-negative"]
    labelled = job("labelled", ["tile", "a red tile"], "soft_target")
    prepared(labelled)
    assert "repeated-captions" not in labelled.notices(0)
    assert "have no label" in labelled.notices(0)["rows-without-label"]


def test_a_teacher_with_random_weights_is_told_of(make_job: MakeJob) -> None:
    job = make_job(loss={"terms": [{"name": "infonce"}, {"name": "distillation"}]}, train=SHORT)
    prepared(job)
    assert "random weights" in job.notices(0)["teacher-untrained"]
