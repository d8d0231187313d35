"""Preparation and runs in this process: what is said about wrong or odd jobs."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cliptune.errors import (
    CliptuneError,
    DataError,
    InvalidInputError,
    MissingColumnError,
    PathOutsideRootsError,
    SpecError,
)
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, manifest_of
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.training.hold import Ending
from cliptune_trainer.training.run import run
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob

SHORT = {"epochs": 1, "batch_size": 8}


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


def prepared(job: TrainerJob) -> None:
    journal = Journal(job.folder.journal(0), 0)
    try:
        prepare(job.folder, [job.root], Reporter(journal))
    finally:
        journal.close()


def trained(job: TrainerJob, attempt: int = 1, inbox: Inbox | None = None) -> Ending:
    journal = Journal(job.folder.journal(attempt), attempt)
    try:
        return run(job.folder, [job.root], Reporter(journal), inbox or Inbox(), linked=False)
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("parts", "path", "allowed"),
    [
        ({"train": {"schedule": "cosin"}}, "train.schedule", "cosine, linear, constant"),
        ({"train": {"epochs": 0}}, "train.epochs", "1 to 100000"),
        ({"train": {"learning_rate": -1.0}}, "train.learning_rate", "above 0"),
        ({"train": {"precision": "fp8"}}, "train.precision", "auto, fp32, bf16, fp16"),
        ({"train": {"clip_norm": -1}}, "train.clip_norm", "at least 0"),
        ({"loss": {"name": "hinge"}}, "loss.name", "infonce, sigmoid, multi_positive"),
        ({"data": {"augmentation": "mixup"}}, "data.augmentation", "none, flip, crop"),
        ({"data": {"train": ""}}, "data.train", "CSV"),
        ({"data": {"max_bad_fraction": 2}}, "data.max_bad_fraction", "0 to 1"),
        ({"model": {"name": ""}}, "model.name", "open_clip"),
        ({"resources": {"device": "tpu"}}, "resources.device", "auto, cpu, mps"),
        ({"resources": {"threads": 0}}, "resources.threads", "1 to"),
        ({"evaluation": {"classes": [{"label": "red"}]}}, "evaluation.classes", "at least two"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep", "1 to"),
        (
            {"evaluation": {"classes": [{"label": "x"}, {"label": "y"}]}},
            "evaluation.classes",
            "['blue', 'green', 'red']",
        ),
    ],
)
def test_a_wrong_field_is_named_by_its_path_with_what_is_allowed(
    make_job: MakeJob, parts: dict[str, Any], path: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        prepared(make_job(**parts))
    assert caught.value.metadata["path"] == path
    assert allowed in caught.value.metadata["allowed"]
    assert path in caught.value.message


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"data": {"caption_column": "text"}}, MissingColumnError),
        ({"data": {"train": "/etc/passwd"}}, PathOutsideRootsError),
        ({"data": {"train": "nothing.csv"}}, DataError),
        ({"model": {"name": "ViT-B-23"}}, InvalidInputError),
        ({"resources": {"device": "cuda:77"}}, InvalidInputError),
    ],
)
def test_what_cannot_be_trained_is_refused_in_preparation(
    make_job: MakeJob, parts: dict[str, Any], error: type[CliptuneError]
) -> None:
    with pytest.raises(error):
        prepared(make_job(**parts))


def test_preparation_names_bad_rows_in_one_notice_and_the_run_leaves_them_out(
    make_job: MakeJob, tiles: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tiles, tmp_path / "data")
    (data / "5.png").write_bytes(b"")
    with (data / "tiles.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["gone.png", "a red tile", "red", "m"])
    job = make_job(root=data, data={"train": str(data / "tiles.csv"), "max_bad_fraction": 0.05}, train=SHORT)
    prepared(job)
    notice = job.notices(0)["rows-skipped"]
    assert notice.startswith("2 rows")
    assert "row 6: 5.png" in notice
    assert "row 61: gone.png" in notice
    plan = next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))
    assert (plan.bad_rows, plan.train_samples + plan.validation_samples) == (2, 59)
    assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert "rows-skipped" not in job.notices(1)


def test_a_batch_of_more_rows_than_there_are_is_refused_with_the_way_out(make_job: MakeJob) -> None:
    with pytest.raises(SpecError, match=r"train\.batch_size is 500; allowed: at most 54") as caught:
        prepared(make_job(train={"batch_size": 500}))
    assert "leave it out" in caught.value.metadata["allowed"]


def test_an_unnamed_batch_is_no_larger_than_the_rows(
    make_job: MakeJob,
) -> None:
    job = make_job(train={"epochs": 1})
    job.forget("train", "batch_size")
    prepared(job)
    plan = next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))
    assert plan.batch_size == 54
    assert "no more than 54 rows" in {item.subject: item.reason for item in plan.decisions}["batch_size"]
    assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert list(job.losses(1)) == [1]


def test_a_corrupt_newest_checkpoint_gives_way_to_the_one_before_it(make_job: MakeJob) -> None:
    job = make_job(train={"epochs": 2, "batch_size": 8}, checkpoint={"every_steps": 5})
    trained(job)
    newest = job.folder.checkpoints / "step-00000012" / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    shutil.rmtree(job.folder.export)
    assert trained(job, 2).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert "step-00000012" in job.notices(2)["checkpoint-unreadable"]
    assert job.losses(2) == {step: loss for step, loss in job.losses(1).items() if step > 10}
    assert job.folder.export.is_dir()


def test_a_run_that_was_killed_before_its_export_only_exports(make_job: MakeJob) -> None:
    job = make_job(train=SHORT)
    trained(job)
    shutil.rmtree(job.folder.export)
    assert trained(job, 2).export_path == "export"
    assert not job.losses(2)
    assert "evaluation" not in job.kinds(2)


def test_a_loss_that_never_is_finite_fails_with_advice(make_job: MakeJob, clip: Clip, tmp_path: Path) -> None:
    with torch.no_grad():
        cast(nn.Parameter, clip.model.visual.proj).fill_(torch.nan)  # type: ignore[union-attr]
    export_model(clip, tmp_path / "broken", manifest_of(clip))
    job = make_job(
        train={"epochs": 4, "batch_size": 8},
        data={"validation_fraction": 0},
        model={"name": f"local-dir:{tmp_path / 'broken'}"},
    )
    with pytest.raises(InvalidInputError, match=r"10 steps in a row.*learning_rate"):
        trained(job)
    assert not job.losses(1)
    assert "step-skipped" in job.notices(1)


def test_an_image_that_goes_bad_while_training_costs_a_notice(
    make_job: MakeJob, tiles: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tiles, tmp_path / "data")
    job = make_job(
        root=data,
        data={"train": str(data / "tiles.csv"), "max_bad_fraction": 0.05, "validation_fraction": 0},
        train=SHORT,
    )
    prepared(job)
    (data / "7.png").unlink()
    (data / "8.png").write_bytes(b"GIF89a")
    assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert "image-unreadable" in job.notices(1)
    assert len(job.losses(1)) == 7


def test_a_table_that_changed_after_preparation_is_read_anew_with_a_notice(
    make_job: MakeJob, tiles: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tiles, tmp_path / "data")
    job = make_job(root=data, data={"train": str(data / "tiles.csv")}, train=SHORT)
    prepared(job)
    table = data / "tiles.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:41]) + "\n")
    assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert "data-changed" in job.notices(1)
    assert len(job.losses(1)) == 4


def test_several_captions_of_one_image_never_part_and_all_count(make_job: MakeJob, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    random = np.random.default_rng(0)
    with (data / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for image in range(10):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / f"{image}.jpg")
            writer.writerows([f"{image}.jpg", f"view {view} of scene {image}"] for view in range(5))
    job = make_job(
        root=data,
        data={"train": str(data / "rows.csv"), "label_column": "", "validation_fraction": 0.2},
        train=SHORT,
        loss={"name": "multi_positive"},
    )
    assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    evaluation = next(
        event.event.evaluation for event in job.journal(1) if event.event.HasField("evaluation")
    )
    assert evaluation.samples == 2
    assert evaluation.metrics["retrieval/image_to_text_recall@10"] == 1.0
    assert "zero_shot/accuracy" not in evaluation.metrics


def test_a_job_without_validation_rows_trains_and_refuses_to_evaluate(make_job: MakeJob) -> None:
    job = make_job(data={"validation_fraction": 0}, train=SHORT)
    inbox = Inbox()
    evaluate = job_pb2.JobCommand(evaluate=job_pb2.EvaluateCommand())
    inbox.put(trainer_pb2.Instruction(command_id="a", command=evaluate))
    assert trained(job, inbox=inbox).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert "evaluation" not in job.kinds(1)
    done = next(event.event.command for event in job.journal(1) if event.event.HasField("command"))
    assert done.error.reason == "InvalidInputError"
    assert "no-validation" in job.notices(1)


def test_a_rate_for_random_weights_on_pretrained_ones_is_warned_about(make_job: MakeJob) -> None:
    first = make_job("first", train=SHORT)
    trained(first)
    model = {"name": f"local-dir:{first.folder.export}"}
    second = make_job("second", model=model, train={**SHORT, "learning_rate": 5e-4})
    prepared(second)
    assert "forget" in second.notices(0)["learning-rate-high"]
    third = make_job("third", model=model)
    spec = third.path / "spec.json"
    spec.write_text(spec.read_text().replace('"learning_rate": 0.001, ', ""))
    prepared(third)
    plan = next(event.event.plan for event in third.journal(0) if event.event.HasField("plan"))
    chosen = {decision.subject: decision for decision in plan.decisions}["learning_rate"]
    assert 1e-6 <= float(chosen.choice) < 1e-4
    assert chosen.reason.startswith("the weights are pretrained")
