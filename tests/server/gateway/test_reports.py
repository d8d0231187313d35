"""A finished job's report over both transports, and a guard's probe at submission, against a real daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cliptune import Client, JobState, NotFoundError
from cliptune.cli.main import main
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import write_shapes
from tests.support.models import export_test_model


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    root = tmp_path_factory.mktemp("reports")
    write_shapes(root / "data")
    export_test_model(root / "start")
    with running_daemon(root / "home", data_roots=[root], wait_ready=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[Client]:
    with Client(daemon.grpc) as client:
        yield client


def spec(daemon: RunningDaemon, name: str, **parts: Any) -> dict[str, Any]:
    root = daemon.home.parent
    return {
        "name": name,
        "model": {"name": f"local-dir:{root / 'start'}"},
        "data": {
            "train": str(root / "data" / "data.csv"),
            "label_column": "label",
            "split_column": "split",
        },
        "train": {"batch_size": 6, "epochs": 1},
        "evaluation": {"bootstrap_samples": 20},
        "publish": {"serve": False},
        "resources": {"device": "cpu", "threads": 1},
        **parts,
    }


def test_a_job_s_report_is_served_by_both_transports_and_saved_by_the_command(
    daemon: RunningDaemon, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = {"data": str(daemon.home.parent / "data" / "data.csv"), "label_column": "label"}
    guard = {"points": [0.5], "tolerance": 1.0, "probe": probe}
    job = client.wait_job(client.create_job(spec(daemon, "guarded", guard=guard)).id)
    assert job.state is JobState.SUCCEEDED, job.state_reason
    assert job.evaluation is not None
    assert job.evaluation.general is not None
    assert job.evaluation.general.main_metric == "zero_shot/balanced_accuracy"
    curve = job.evaluation.guard
    assert curve is not None
    assert [point.share for point in curve.points] == [0.0, 0.5, 1.0]

    report = client.job_report(job.id)
    assert report.figures["job"]["id"] == job.id
    assert report.figures["evaluations"][-1]["guard"]["reason"] == curve.reason
    with httpx.Client(base_url=daemon.url, timeout=60) as rest:
        page = rest.get(f"/v1/jobs/{job.id}/report")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.text == report.html
        figures = rest.get(f"/v1/jobs/{job.id}/report.json")
        assert figures.json() == report.figures
        drawn = rest.get(f"/v1/jobs/{job.id}/{curve.picture}")
        assert drawn.content.startswith(b"\x89PNG")

    file = tmp_path / "page.html"
    assert main(["jobs", "report", job.id, "--output", str(file), "--address", daemon.grpc]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    assert file.read_text(encoding="utf-8") == report.html
    assert main(["jobs", "report", job.id, "--json", "--address", daemon.grpc]) == 0
    assert json.loads(capsys.readouterr().out) == report.figures


def test_a_job_without_a_report_says_how_it_stands(daemon: RunningDaemon, client: Client) -> None:
    job = client.create_job(spec(daemon, "long", train={"batch_size": 6, "epochs": 10_000}))
    with pytest.raises(NotFoundError, match="has no report: one is written when a job succeeds"):
        client.job_report(job.id)
    with httpx.Client(base_url=daemon.url, timeout=60) as rest:
        answer = rest.get(f"/v1/jobs/{job.id}/report")
        assert (answer.status_code, answer.json()["reason"]) == (404, "NotFoundError")
        gone = rest.get("/v1/jobs/none-00000000/report")
        assert (gone.status_code, gone.json()["reason"]) == (404, "JobNotFoundError")
    client.cancel_job(job.id)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ({"data": "/etc/hosts"}, "PathOutsideRootsError"),
        ({"data": "nothing.csv"}, "DataError"),
        ({"label_column": "label"}, "SpecError"),
        ({"data": "dataset:none"}, "DatasetNotFoundError"),
    ],
    ids=["outside the roots", "no file", "no data", "no data set"],
)
def test_a_probe_that_is_not_there_is_refused_at_submission(
    daemon: RunningDaemon, probe: dict[str, str], reason: str
) -> None:
    body = {"spec": spec(daemon, "refused", guard={"probe": probe})}
    with httpx.Client(base_url=daemon.url, timeout=60) as rest:
        answer = rest.post("/v1/jobs", json=body)
    assert answer.json()["reason"] == reason
    assert "guard.probe" in answer.text or reason == "DatasetNotFoundError"
