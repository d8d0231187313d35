"""Jobs over REST against a real daemon and its real trainers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format

from cliptune.v1 import job_pb2, training_pb2, training_pb2_grpc
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import write_shapes

KINDS = {"state", "plan", "log", "evaluation", "progress", "checkpoint", "published", "command", "notice"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    root = tmp_path_factory.mktemp("rest-jobs")
    write_shapes(root / "data")
    with running_daemon(root / "home", data_roots=[root], wait_ready=False) as running:
        yield running


@pytest.fixture(scope="module")
def rest(daemon: RunningDaemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=90) as client:
        yield client


def spec(daemon: RunningDaemon, name: str, **train: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"name": "cliptune-test-vit"},
        "data": {
            "train": str(daemon.home.parent / "data" / "data.csv"),
            "label_column": "label",
            "split_column": "split",
        },
        "train": {"batch_size": 6, "epochs": 1, **train},
        "publish": {"serve": False},
        "resources": {"device": "cpu", "threads": 1},
    }


def frames(
    rest: httpx.Client, job_id: str, *, after: int = 0, headers: dict[str, str] | None = None
) -> Iterator[dict[str, str]]:
    """The stream's events as a browser reads them; comments and retry times left out."""
    with rest.stream("GET", f"/v1/jobs/{job_id}/events", params={"after": after}, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if not line:
                if "event" in fields:
                    yield fields
                fields = {}
            elif not line.startswith(":"):
                key, _, value = line.partition(": ")
                fields[key] = value


def until(rest: httpx.Client, job_id: str, kind: str, *, after: int = 0) -> int:
    """Number of the next event of this kind; the connection is closed there."""
    for frame in frames(rest, job_id, after=after):
        if frame["event"] == kind:
            return int(frame["id"])
    raise AssertionError(f"the job ended without an event {kind!r}")


def test_a_job_is_created_watched_and_found_over_rest_as_over_grpc(
    daemon: RunningDaemon, rest: httpx.Client
) -> None:
    body = {"spec": spec(daemon, "shapes")}
    created = rest.post("/v1/jobs", json=body, headers={"Idempotency-Key": "once"})
    assert created.status_code == 201
    job_id = created.json()["id"]
    assert created.headers["location"] == f"/v1/jobs/{job_id}"
    again = rest.post("/v1/jobs", json=body, headers={"Idempotency-Key": "once"})
    assert again.json()["id"] == job_id

    # The first connection is lost in the middle; the second goes on from what was seen last.
    seen = []
    for frame in frames(rest, job_id):
        seen.append(frame)
        if frame["event"] == "progress":
            break
    reconnect = {"Last-Event-ID": seen[-1]["id"]}
    seen += frames(rest, job_id, after=1, headers=reconnect)
    *events, end = seen
    assert [int(event["id"]) for event in events] == list(range(1, len(events) + 1))
    assert {event["event"] for event in events} <= KINDS
    assert end["event"] == "end"
    assert json.loads(end["data"]) == {"last_event_number": len(events)}

    with grpc.insecure_channel(daemon.grpc) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        watched = list(stub.WatchJob(training_pb2.WatchJobRequest(job_id=job_id)))
        job = stub.GetJob(training_pb2.GetJobRequest(job_id=job_id)).job
    read = [json_format.Parse(event["data"], job_pb2.JobEvent()) for event in events]
    assert read == [answer.event for answer in watched]
    shown = rest.get(f"/v1/jobs/{job_id}").json()
    assert json_format.ParseDict(shown, job_pb2.Job()) == job
    assert shown["state"] == "JOB_STATE_SUCCEEDED"
    assert shown["model"] == "shapes:1"

    seen_all = {"Last-Event-ID": str(len(events))}
    assert rest.get(f"/v1/jobs/{job_id}/events", headers=seen_all).status_code == 204
    listed = rest.get("/v1/jobs", params={"state": ["SUCCEEDED", "FAILED"], "page_size": 1000}).json()
    assert job_id in [each["id"] for each in listed["jobs"]]
    assert rest.get("/v1/jobs", params={"state": "PAUSED"}).json()["jobs"] == []
    metrics = rest.get("/metrics").text
    assert 'cliptune_jobs{state="SUCCEEDED"} 1.0' in metrics
    assert "cliptune_job_watchers 0.0" in metrics

    finished = rest.post(f"/v1/jobs/{job_id}/pause")
    assert (finished.status_code, finished.json()["reason"]) == (409, "JobStateError")
    assert "SUCCEEDED" in finished.json()["detail"]
    assert rest.delete(f"/v1/jobs/{job_id}").status_code == 204
    for gone in (rest.get(f"/v1/jobs/{job_id}"), rest.get(f"/v1/jobs/{job_id}/events")):
        assert (gone.status_code, gone.json()["reason"]) == (404, "JobNotFoundError")


def test_an_evaluation_tells_intervals_and_classes_and_its_picture_alone_is_served(
    daemon: RunningDaemon, rest: httpx.Client
) -> None:
    body = {"spec": spec(daemon, "shapes")}
    job_id = rest.post("/v1/jobs", json=body, headers={"Idempotency-Key": "once"}).json()["id"]
    assert [frame["event"] for frame in frames(rest, job_id)][-1] == "end"
    evaluation = rest.get(f"/v1/jobs/{job_id}").json()["evaluation"]
    assert evaluation["main_metric"] in evaluation["metrics"]
    interval = evaluation["intervals"]["zero_shot/accuracy"]
    assert interval["low"] <= evaluation["metrics"]["zero_shot/accuracy"] <= interval["high"]
    assert sum(entry["samples"] for entry in evaluation["classes"]) == evaluation["samples"]
    assert len(evaluation["confusion"]) == len(evaluation["classes"]) ** 2

    (path,) = evaluation["pictures"]
    answer = rest.get(f"/v1/jobs/{job_id}/{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content.startswith(b"\x89PNG")
    (daemon.home / "jobs" / job_id / "pictures" / "link.png").symlink_to(Path("..") / "spec.json")
    for name in ("confusion-99999999.png", "..%2Fspec.json", "spec.json", "link.png", ".png"):
        missing = rest.get(f"/v1/jobs/{job_id}/pictures/{name}")
        assert (missing.status_code, missing.json()["reason"]) == (404, "NotFoundError"), name
    gone = rest.get("/v1/jobs/none-00000000/pictures/confusion-00000001.png")
    assert (gone.status_code, gone.json()["reason"]) == (404, "JobNotFoundError")


def test_a_running_job_obeys_every_command_over_rest(daemon: RunningDaemon, rest: httpx.Client) -> None:
    job_id = rest.post("/v1/jobs", json={"spec": spec(daemon, "long", epochs=100_000)}).json()["id"]
    after = until(rest, job_id, "progress")
    for path, body in (
        ("checkpoint", None),
        ("evaluate", None),
        ("learning-rate", {"learning_rate": 1e-4}),
        ("yield", {"seconds": 0.01}),
    ):
        told = rest.post(f"/v1/jobs/{job_id}/{path}", json=body)
        assert told.status_code == 200, told.text
        assert told.json()["event_number"] > after
        after = told.json()["event_number"]
    paused = rest.post(f"/v1/jobs/{job_id}/pause").json()
    assert paused["command_id"]
    assert paused["job"]["state"] == "JOB_STATE_PAUSED"
    resumed = rest.post(f"/v1/jobs/{job_id}/resume").json()
    assert resumed["job"]["state"] in ("JOB_STATE_QUEUED", "JOB_STATE_RUNNING")
    assert rest.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
    *_, last, end = frames(rest, job_id, after=resumed["event_number"])
    assert json.loads(last["data"])["state"]["state"] == "JOB_STATE_CANCELLED"
    assert end["event"] == "end"


def test_a_wrong_spec_is_told_with_its_path_and_what_is_allowed(
    daemon: RunningDaemon, rest: httpx.Client
) -> None:
    def refused(**changed: Any) -> tuple[int, str, str]:
        answer = rest.post("/v1/jobs", json={"spec": {**spec(daemon, "wrong"), **changed}})
        problem = answer.json()
        return answer.status_code, problem["reason"], problem["metadata"].get("path", "")

    assert refused(train={"epoch": 1}) == (422, "SpecError", "train.epoch")
    assert refused(loss={"tiling": "maybe"}) == (422, "SpecError", "loss.tiling")
    assert refused(train={"learning_rate": -1}) == (422, "SpecError", "train.learning_rate")
    status, reason, path = refused(data={"train": "/etc/passwd"})
    assert (status, reason, path) == (403, "PathOutsideRootsError", "/etc/passwd")
    answer = rest.post("/v1/jobs", json={"spec": {"name": 3}})
    assert (answer.status_code, answer.json()["reason"]) == (422, "SpecError")
    assert rest.post("/v1/jobs", json={"specification": {}}).status_code == 400


def test_validate_only_answers_with_the_plan_and_keeps_nothing(
    daemon: RunningDaemon, rest: httpx.Client
) -> None:
    answer = rest.post("/v1/jobs", json={"spec": spec(daemon, "tried"), "validate_only": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["plan"]["total_steps"] == 3
    names = [job["spec"]["name"] for job in rest.get("/v1/jobs").json()["jobs"]]
    assert "tried" not in names


def test_a_stop_of_the_daemon_ends_event_streams_with_a_word(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data")
    with (
        running_daemon(tmp_path / "home", data_roots=[tmp_path], wait_ready=False) as daemon,
        httpx.Client(base_url=daemon.url, timeout=90) as rest,
    ):
        job_id = rest.post("/v1/jobs", json={"spec": spec(daemon, "long", epochs=100_000)}).json()["id"]
        stream = frames(rest, job_id)
        for frame in stream:
            if frame["event"] == "progress":
                break
        daemon.process.terminate()
        *_, last = stream
        assert last["event"] == "error"
        assert json.loads(last["data"])["reason"] == "UnavailableError"
        assert daemon.wait() == 0
