"""Studies on a real daemon: trials are its jobs, and what is known of them outlives processes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from cliptune import Client, InvalidInputError, JobState, SpecError, TrialDone, load_spec
from tests.support.daemon import running_daemon
from tests.support.datasets import Shapes, write_shapes

RATE = {"path": "train.learning_rate", "low": 1e-5, "high": 1e-2, "log": True}
METRIC = "retrieval/text_to_image_recall@1"


def study(shapes: Shapes, name: str, *, epochs: int = 1, **tune: object) -> dict[str, object]:
    return {
        "name": name,
        "model": {"name": "cliptune-test-vit"},
        "data": {"train": str(shapes.csv), "label_column": "label", "split_column": "split"},
        "train": {"epochs": epochs, "batch_size": 6, "learning_rate": 1e-3},
        "evaluation": {"main_metric": METRIC},
        "resources": {"device": "cpu", "threads": 1},
        "tune": {"parameters": [RATE], "max_trials": 2, **tune},
    }


def test_a_study_begins_with_what_the_spec_says_and_leaves_a_spec_a_table_and_plots(tmp_path: Path) -> None:
    shapes, home = write_shapes(tmp_path / "shapes"), tmp_path / "home"
    daemon = running_daemon(home, data_roots=[tmp_path], wait_ready=False)
    with daemon as running, Client(running.grpc) as client:
        job = client.create_job(study(shapes, "search"))
        bodies = [event.body for event in client.watch_job(job.id)]
        ended = client.get_job(job.id)
        assert ended.state == JobState.SUCCEEDED, ended.error
        trials = [body for body in bodies if isinstance(body, TrialDone)]
        assert ended.trials == tuple(trials)
        assert [trial.number for trial in trials] == [0, 1]
        assert float(trials[0].settings["train.learning_rate"]) == 1e-3
        assert all(trial.outcome == "complete" and trial.value is not None for trial in trials)
        assert trials[0].best
        # Ordinary jobs, which have published nothing.
        for trial in trials:
            run = client.get_job(trial.job_id)
            assert run.state == JobState.SUCCEEDED
            assert run.spec.train.learning_rate == float(trial.settings["train.learning_rate"])
            assert run.evaluation is not None
            assert run.evaluation.metrics[METRIC] == trial.value
            assert not run.model
            assert not list((home / "jobs" / trial.job_id).glob("checkpoints/*"))
        assert client.list_models() == []
        best = max(trials, key=lambda trial: (trial.value or 0.0, -trial.number))
        with httpx.Client(base_url=f"{running.url}/v1/jobs/{job.id}", trust_env=False) as files:
            (tmp_path / "best.toml").write_text(files.get("/study/best.toml").raise_for_status().text)
            again = load_spec(tmp_path / "best.toml")
            assert again.train.learning_rate == float(best.settings["train.learning_rate"])
            assert not again.HasField("tune")
            table = files.get("/study/trials.csv").raise_for_status().text
            assert [row["outcome"] for row in csv.DictReader(table.splitlines())] == ["complete"] * 2
            page = files.get("/study/study.html").raise_for_status()
            assert "Plotly.newPlot" in page.text
            assert page.headers["content-security-policy"] == "sandbox allow-scripts"
            assert files.get("/study/study.db").status_code == 404
            for name in ("history", "parallel"):
                (tmp_path / "plot.png").write_bytes(files.get(f"/pictures/study-{name}.png").read())
                with Image.open(tmp_path / "plot.png") as picture:
                    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_a_study_whose_daemon_is_killed_goes_on_with_the_trials_that_it_had(tmp_path: Path) -> None:
    shapes, home = write_shapes(tmp_path / "shapes"), tmp_path / "home"
    begun: list[TrialDone] = []
    first = running_daemon(home, data_roots=[tmp_path], wait_ready=False)
    with first as running, Client(running.grpc) as client:
        job_id = client.create_job(study(shapes, "outlives", max_trials=3)).id
        for event in client.watch_job(job_id):
            if isinstance(event.body, TrialDone):
                begun.append(event.body)
                break
        running.kill()
    second = running_daemon(home, data_roots=[tmp_path], wait_ready=False)
    with second as running, Client(running.grpc) as client:
        ended = client.wait_job(job_id)
        assert ended.state == JobState.SUCCEEDED, ended.error
        assert [trial.number for trial in ended.trials] == [0, 1, 2]
        assert ended.trials[0] == begun[0]
        jobs = {trial.job_id for trial in ended.trials}
        # None was submitted twice.
        assert {job.id for job in client.list_jobs()} == {job_id, *jobs}
        assert len(jobs) == 3


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        ({"parameters": [{**RATE, "path": "train.learningrate"}]}, "did you mean train.learning_rate"),
        ({"parameters": [{**RATE, "high": 100.0}]}, "train.learning_rate is 100"),
        ({"parameters": [{**RATE, "low": 0.1}]}, "a range from low up to high"),
        ({"parameters": [{"path": "loss.name", "values": ["infonce", "infonc"]}]}, "infonc"),
        ({"metric": "zero_shot/acuracy"}, "zero_shot/accuracy"),
        ({"budget_seconds": 0.5}, "tune.budget_seconds"),
    ],
    ids=["path", "bound", "range", "value", "metric", "budget"],
)
def test_a_search_that_cannot_work_is_refused_before_the_first_trial(
    tune: dict[str, object], told: str, shared: tuple[Client, Shapes]
) -> None:
    client, shapes = shared
    with pytest.raises(SpecError, match=told):
        client.create_job(study(shapes, "refused", **tune), validate_only=True)
    assert client.list_jobs() == []


def test_a_study_without_validation_rows_is_refused(shared: tuple[Client, Shapes]) -> None:
    client, shapes = shared
    spec = study(shapes, "blind")
    spec["data"] = {"train": str(shapes.csv), "validation_fraction": 0.0}
    with pytest.raises(InvalidInputError, match="validation rows"):
        client.create_job(spec, validate_only=True)


def test_the_plan_tells_what_varies_when_the_spec_does_not_say(shared: tuple[Client, Shapes]) -> None:
    client, shapes = shared
    spec = study(shapes, "usual", parameters=[])
    spec["loss"] = {"name": "margin"}
    plan = client.create_job(spec, validate_only=True).plan
    assert plan is not None
    told = {made.choice: made.reason for made in plan.decisions if made.subject == "tune"}
    loss = {"loss.parameters.margin", "loss.parameters.hardest"}
    assert set(told) == {"train.learning_rate", "train.weight_decay", *loss}
    assert told["loss.parameters.hardest"] == "one of 0, 1; first 0"
    assert told["train.learning_rate"] == "0.0001 to 0.01, in the logarithm; first 0.001"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Shapes]]:
    folder = tmp_path_factory.mktemp("studies")
    shapes = write_shapes(folder / "shapes")
    daemon = running_daemon(folder / "home", data_roots=[folder], wait_ready=False)
    with daemon as running, Client(running.grpc) as client:
        yield client, shapes
