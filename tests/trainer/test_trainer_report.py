"""What a finished job leaves for people and programs, and that it is readable on its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format

from cliptune.v1 import spec_pb2
from cliptune_model.clip import build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.source import ModelSource
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.table import Pair
from cliptune_trainer.report.charts import Line, line_chart
from cliptune_trainer.report.examples import Examples, samples_of
from cliptune_trainer.report.page import page_of
from tests.trainer.conftest import MakeJob, job_on
from tests.trainer.jobs import TrainerJob
from tests.trainer.test_trainer_guard import task

SHORT = {"epochs": 2, "batch_size": 8}
ONE = {"epochs": 1, "batch_size": 16}
FEW = {"bootstrap_samples": 20}


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainerJob:
    """A guarded job that has ended, its preparation before it: not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    start = folder / "start"
    clip = build(ModelSource(name="cliptune-test-vit"), seed=5)
    export_model(clip, start, manifest_of(clip))
    job = job_on(
        tiles,
        folder,
        "tiles",
        model={"name": f"local-dir:{start}"},
        train=SHORT,
        evaluation=FEW,
        guard={"points": [0.5], "tolerance": 1.0, "probe": {"data": "agreement"}},
        resources={"price_per_hour": 3.6},
        data={"validation_fraction": 0.4},
    )
    task(job, 0)
    task(job, 1)
    torch.use_deterministic_algorithms(False)
    return job


@pytest.fixture
def again(finished: TrainerJob, tmp_path: Path) -> TrainerJob:
    """The same one, to be changed."""
    return finished.copied(tmp_path / "again")


class Reader(HTMLParser):
    """Collects what a page names and what it says, and that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_finished_job_leaves_a_page_that_reaches_for_nothing(finished: TrainerJob) -> None:
    page = (finished.folder.report / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert reader.links
    assert all(
        link.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for link in reader.links
    )
    assert not reader.tags & {"script", "link", "iframe", "object", "form"}
    assert not re.search(r"url\(|@import|https?://", page.split("</style>")[0])
    said = " ".join(reader.text)
    for title in ("Before and after", "general knowledge", "Curves", "Classes", "Retrieval", "Data", "Spec"):
        assert title in said, title
    assert "a red tile, number 0" in said
    assert "taken for" in said or "✓" in said
    assert len(page) < 1_000_000


def test_the_figures_are_those_of_the_job_s_own_events(finished: TrainerJob) -> None:
    figures: dict[str, Any] = json.loads((finished.folder.report / "report.json").read_text())
    told = {step: value[0] for step, value in finished.losses(1).items()}
    curves = figures["curves"]
    assert dict(zip(curves["step"], curves["loss"], strict=True)) == pytest.approx(told)
    occasions = [one["occasion"] for one in figures["evaluations"]]
    assert occasions == ["before", "during", "after"]
    after = figures["evaluations"][-1]
    assert after["guard"]["points"][-1]["share"] == 1.0
    assert after["general"]["main_metric"] == "agreement"
    assert after["intervals"]
    assert figures["data"]["train"]["rows"] + figures["data"]["validation"]["rows"] == 60
    assert (
        sum(found["train"] for found in figures["data"]["labels"].values())
        == figures["data"]["train"]["rows"]
    )
    time = figures["time"]
    assert time["device_s"] > 0
    assert time["cost"] == pytest.approx(time["device_s"] / 3600 * 3.6)
    assert {made["subject"] for made in figures["decisions"]} >= {"guard", "device"}
    assert figures["job"]["attempts"] == 1
    spec = json_format.ParseDict(figures["spec"], spec_pb2.JobSpec())
    assert spec.train.batch_size == 8
    assert spec.guard.points == [0.5]


def test_a_job_without_validation_rows_or_labels_has_a_report_too(make_job: MakeJob) -> None:
    job = make_job("plain", data={"validation_fraction": 0.0}, train=ONE)
    job.forget("data", "label_column")
    task(job, 1)
    page = (job.folder.report / "report.html").read_text(encoding="utf-8")
    assert "Curves" in page
    assert "Retrieval" not in page
    assert json.loads((job.folder.report / "report.json").read_text())["evaluations"] == []


def test_a_resumed_job_tells_each_step_once_as_it_went_last(again: TrainerJob) -> None:
    first = again.folder.journal(1).read_text()
    repeated = first.replace('"attempt": 1', '"attempt": 2')
    again.folder.journal(2).write_text(repeated + '{"attempt": 2, "torn')
    task(again, 3)
    figures = json.loads((again.folder.report / "report.json").read_text())
    assert figures["job"]["attempts"] == 3
    assert len(set(figures["curves"]["step"])) == len(figures["curves"]["step"])


def test_a_report_that_cannot_be_written_fails_no_job(again: TrainerJob) -> None:
    report = again.folder.report
    for file in report.iterdir():
        file.unlink()
    report.rmdir()
    report.write_text("in the way")
    task(again, 2)
    assert "cannot be written" in again.notices(2)["report-failed"]


def test_words_of_the_data_cannot_become_part_of_the_page(
    make_job: MakeJob, tmp_path: Path, tiles: Path
) -> None:
    file = tmp_path / "odd.csv"
    evil = "<script>alert(1)</script>"
    rows = [f'{row}.png,"{evil} {row % 3}",{evil}{row % 3}' for row in range(30)]
    file.write_text("\n".join(["image,caption,label", *rows, ""]))
    job = make_job("odd", data={"train": str(file), "image_root": str(tiles)}, train=ONE, evaluation=FEW)
    task(job, 1)
    page = (job.folder.report / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_chart_leaves_out_what_is_no_number_and_draws_a_single_point() -> None:
    nan = float("nan")
    chart = line_chart("a < b", [Line(name="loss", points=[(1, 2.0), (2, nan), (3, 1.0)])], "step")
    assert "nan" not in chart
    assert "a &lt; b" in chart
    assert chart.count(",") == 2
    assert "circle" in line_chart("one", [Line(name="x", points=[(1, 0.0)])], "step")
    assert line_chart("none", [Line(name="x", points=[(1, nan)])], "step") == ""


def test_a_chart_s_scales_are_of_round_numbers() -> None:
    chart = line_chart("rate", [Line(name="x", points=[(1, 0.0), (12, 3.1e-5), (24, 1e-5)])], "step")
    said = re.findall(r">([^<>]+)</text>", chart)
    assert {"0", "1.0e-5", "3.0e-5", "5", "10", "20"} <= set(said)
    assert not any(text.startswith("-") for text in said)


def test_what_was_gained_is_not_told_as_a_loss_and_metrics_stand_in_the_order_of_their_numbers(
    finished: TrainerJob,
) -> None:
    figures = json.loads((finished.folder.report / "report.json").read_text())
    general = figures["evaluations"][-1]["general"]

    def page(loss: float) -> str:
        general["loss"] = loss
        return page_of(figures, [], Examples(), {}, "")

    assert "2.00 points less than the starting model" in page(0.02)
    gained = page(-0.02)
    assert "2.00 points more than the starting model" in gained
    assert "2.00 points gained" in gained
    places = [gained.index(f"image_to_text_recall@{k}<") for k in (1, 5, 10)]
    assert places == sorted(places)


def test_sample_images_take_turns_among_labels_and_skip_what_is_gone(tiles: Path) -> None:
    pairs = [
        Pair(row=row, image=tiles / f"{row}.png", reference=f"{row}.png", caption="x", labels=(label,))
        for row, label in enumerate(["many"] * 40 + ["few", "gone"])
    ]
    pairs[-1] = Pair(row=99, image=tiles / "gone.png", reference="gone.png", caption="x", labels=("gone",))
    samples = samples_of(Pairs(pairs))
    assert samples[1].label == "few"
    assert len(samples) == 11
    assert all(sample.uri.startswith("data:image/jpeg") for sample in samples)
