"""What a job tells of its evaluations, and what it says when they cannot be done as asked."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cliptune.errors import SpecError
from cliptune.evaluation import ClassResult
from cliptune.v1 import job_pb2
from cliptune_trainer.evaluation import Measurement
from cliptune_trainer.evaluation.confusion_picture import draw_confusion
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.training.run import run
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob

SHORT = {"epochs": 1, "batch_size": 8}


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


def evaluations(job: TrainerJob) -> list[job_pb2.Evaluation]:
    """Trains, and returns what was told."""
    journal = Journal(job.folder.journal(1), 1)
    try:
        run(job.folder, [job.root], Reporter(journal), Inbox(), linked=False)
    finally:
        journal.close()
    return [event.event.evaluation for event in job.journal(1) if event.event.HasField("evaluation")]


def plan(job: TrainerJob) -> job_pb2.JobPlan:
    journal = Journal(job.folder.journal(0), 0)
    try:
        prepare(job.folder, [job.root], Reporter(journal))
    finally:
        journal.close()
    return next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))


def findings(folder: Path, tiles: Path) -> Path:
    """A table of images with several findings, one or none."""
    file = folder / "findings.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "caption", "finding", "split"])
        for row in range(40):
            found = ["red|dark", "red", "", "dark"][row % 4]
            split = "val" if row % 5 == 0 else "train"
            writer.writerow([str(tiles / f"{row}.png"), f"tile {row}", found, split])
    return file


def test_a_job_tells_intervals_classes_a_confusion_and_a_picture_after_training(make_job: MakeJob) -> None:
    data = {"group_column": "module", "validation_fraction": 0.3}
    job = make_job(train=SHORT, data=data, evaluation={"bootstrap_samples": 50})
    before, after = evaluations(job)
    assert (before.occasion, after.occasion) == ("before", "after")
    assert not before.intervals
    assert not before.pictures
    assert [entry.label for entry in before.classes] == ["blue", "green", "red"]
    assert after.main_metric == before.main_metric == "zero_shot/auroc"
    assert "zero_shot/auroc" in after.intervals
    assert "zero_shot/calibration_error" not in after.intervals
    assert sum(after.confusion) == sum(entry.samples for entry in after.classes) == after.samples
    (picture,) = after.pictures
    assert picture == f"pictures/confusion-{after.step:08d}.png"
    with Image.open(job.path / picture) as drawn:
        assert drawn.format == "PNG"
        assert np.asarray(drawn.convert("L")).std() > 10


def test_rows_of_one_group_alone_have_no_intervals_and_the_job_says_so(make_job: MakeJob) -> None:
    job = make_job(train=SHORT, data={"group_column": "module"})
    _, after = evaluations(job)
    assert not after.intervals
    assert "one group" in job.notices(1)["no-intervals"]


def test_no_resamples_are_no_intervals(make_job: MakeJob) -> None:
    job = make_job(train=SHORT, evaluation={"bootstrap_samples": 0, "main_metric": "zero_shot/accuracy"})
    _, after = evaluations(job)
    assert not after.intervals
    assert after.main_metric == "zero_shot/accuracy"


def test_several_labels_an_image_are_judged_each_by_itself(
    make_job: MakeJob, tmp_path: Path, tiles: Path
) -> None:
    table = {
        "train": str(findings(tmp_path, tiles)),
        "label_column": "finding",
        "label_separator": "|",
        "split_column": "split",
        "image_root": str(tiles),
    }
    classes = [
        {"label": label, "prompts": [f"{label} tile"], "negative_prompts": ["a tile, nothing found"]}
        for label in ("red", "dark")
    ]
    job = make_job(root=tmp_path.parent, data=table, train=SHORT, evaluation={"classes": classes})
    job.root = Path("/")
    _, after = evaluations(job)
    assert [(entry.label, entry.samples) for entry in after.classes] == [("red", 4), ("dark", 4)]
    assert after.samples == 8
    assert not after.confusion
    assert not after.pictures
    assert {"zero_shot/auroc", "zero_shot/average_precision", "zero_shot/calibration_error"} <= set(
        after.metrics
    )
    assert "zero_shot/accuracy" not in after.metrics


def test_labels_take_their_names_and_templates_into_the_prompts(make_job: MakeJob) -> None:
    evaluation = {
        "prompt_templates": ["{label}", "a {label} tile"],
        "label_names": {"red": "crimson", "pink": "rose"},
    }
    job = make_job(train=SHORT, evaluation=evaluation)
    decided = {decision.subject: decision for decision in plan(job).decisions}
    assert decided["classes"].reason.endswith("'{label}' and 'a {label} tile'")
    assert decided["main_metric"].choice == "zero_shot/auroc"
    assert "pink" in job.notices(0)["label-names-unused"]
    assert job.folder.spec().evaluation.prompts_of("red") == ("crimson", "a crimson tile")


@pytest.mark.parametrize(
    ("evaluation", "path", "allowed"),
    [
        ({"main_metric": "zero_shot/f1"}, "evaluation.main_metric", "zero_shot/auroc"),
        ({"main_metric": "zero_shot/accuracy@5"}, "evaluation.main_metric", "zero_shot/accuracy,"),
        ({"bootstrap_samples": -1}, "evaluation.bootstrap_samples", "0 to 100000"),
        ({"prompt_templates": ["a photo"]}, "evaluation.prompt_templates[0]", "{label}"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_measured_is_refused_naming_the_field(
    make_job: MakeJob, evaluation: dict[str, Any], path: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        plan(make_job(evaluation=evaluation))
    assert caught.value.metadata["path"] == path
    assert allowed in caught.value.metadata["allowed"]


def test_a_class_without_a_validation_image_is_named(make_job: MakeJob) -> None:
    classes = [{"label": label} for label in ("red", "green", "violet")]
    job = make_job(train=SHORT, evaluation={"classes": classes})
    plan(job)
    assert "violet" in job.notices(0)["classes-without-images"]
    assert "blue" in job.notices(0)["labels-without-class"]


def test_rows_that_contradict_each_other_about_an_image_are_named(
    make_job: MakeJob, tmp_path: Path, tiles: Path
) -> None:
    file = tmp_path / "rows.csv"
    colours, splits = ("red", "green"), ("val", "train", "train")
    lines = [f"{row}.png,tile {row},{colours[row % 2]},{splits[row % 3]}" for row in range(24)]
    file.write_text("\n".join(["image,caption,label,split", *lines, "3.png,again,red,val", ""]))
    data = {"train": str(file), "image_root": str(tiles), "split_column": "split"}
    job = make_job(root=Path("/"), data=data, train=SHORT)
    plan(job)
    assert job.notices(0)["labels-contradict"].startswith("rows 4, 25 give an image several labels")


def measurement(labels: list[str]) -> Measurement:
    count = len(labels)
    scores = [
        ClassResult(label=label, samples=3, precision=1.0, recall=1.0, auroc=1.0, average_precision=1.0)
        for label in labels
    ]
    confusion = tuple(tuple(3 * (row == column) for column in range(count)) for row in range(count))
    return Measurement(metrics={}, samples=0, unreadable=0, classes=tuple(scores), confusion=confusion)


def test_a_confusion_is_drawn_whatever_the_labels_are(tmp_path: Path) -> None:
    strange = ["$x", "{}", "裂纹", "a" * 300, "\\frac", "%s"]
    assert draw_confusion(measurement(strange), "$odd_name$", tmp_path / "pictures" / "odd.png")
    with Image.open(tmp_path / "pictures" / "odd.png") as drawn:
        assert max(drawn.size) < 3000


def test_a_confusion_of_too_many_classes_is_neither_drawn_nor_told(tmp_path: Path) -> None:
    many = measurement([str(place) for place in range(201)])
    assert not draw_confusion(many, "many", tmp_path / "many.png")
    assert not list(tmp_path.iterdir())
    told = many.told(1, "after", ())
    assert len(told.classes) == 201
    assert not told.confusion
