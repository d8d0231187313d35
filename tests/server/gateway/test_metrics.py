"""What `/metrics` says, and that its list is true."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cliptune.internal.v1 import engine_pb2
from cliptune_server.metrics import JOB_STATES, EngineReading, JobReading, Metrics
from tests.server.gateway.bare import bare_context, client_of

LIST = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(cliptune_\w+)` \| (\w+) \| (.*?) \|", re.MULTILINE)


def busy() -> Metrics:
    """Metrics in which every series exists."""
    metrics = Metrics()
    metrics.observe_rpc("cliptune.v1.InferenceService/EmbedTexts", "OK", 0.01)
    metrics.observe_http("GET", "/v1/jobs/{job_id}", 200, 0.01)
    return metrics


ENGINE = EngineReading(
    ready=True,
    restarts=2,
    status=engine_pb2.StatusResponse(
        models=[engine_pb2.LoadedModel(key="cells:1")],
        resident_bytes=1024,
        running_seconds=0.5,
        queues=[
            engine_pb2.QueueStatus(
                model="cells:1",
                tower="image",
                waiting_items=3,
                batches=5,
                items=40,
                forward_seconds=1.5,
                oldest_seconds=0.25,
                positions=44,
                padding=4,
                expired_items=2,
                batch_sizes=[1, 0, 1, 2, 1],
            )
        ],
        decode_seconds=3.5,
        decoded_items=45,
        shed_requests=6,
        cache=engine_pb2.CacheStatus(hits=8, misses=9, bytes=4096),
    ),
)
JOBS = JobReading(by_state={"RUNNING": 1, "QUEUED": 4}, events=99, watchers=7)


def series(text: bytes) -> dict[tuple[str, ...], float]:
    """(name, label values...) → value."""
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_documented_list_is_the_registry() -> None:
    metrics = busy()
    metrics.render(ENGINE, JOBS, {("cells:2", "ok"): 3})
    exported = {}
    for family in metrics.registry.collect():
        name = {"counter": f"{family.name}_total", "info": f"{family.name}_info"}.get(
            family.type, family.name
        )
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exported[name] = (family.type, labels)
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall(LIST.read_text(encoding="utf-8"))
    }
    assert documented == exported


def test_names_carry_the_house_and_their_unit() -> None:
    metrics = busy()
    metrics.render(ENGINE, JOBS)
    for family in metrics.registry.collect():
        assert family.name.startswith("cliptune_")
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb)(_|$)", family.name)
        assert family.documentation.endswith(".")


def test_readings_of_engine_and_jobs_become_series() -> None:
    found = series(busy().render(ENGINE, JOBS))
    assert found["cliptune_engine_ready",] == 1
    assert found["cliptune_engine_restarts_total",] == 2
    assert found["cliptune_engine_models",] == 1
    assert found["cliptune_inference_queue_items", "cells:1", "image"] == 3
    assert found["cliptune_inference_items_total", "cells:1", "image"] == 40
    assert found["cliptune_inference_forward_seconds_total", "cells:1", "image"] == 1.5
    assert found["cliptune_inference_queue_age_seconds", "cells:1", "image"] == 0.25
    assert found["cliptune_inference_padding_positions_total", "cells:1", "image"] == 4
    assert found["cliptune_inference_expired_items_total", "cells:1", "image"] == 2
    bucket = "cliptune_inference_batch_items_bucket"
    sizes = {key[1]: value for key, value in found.items() if key[0] == bucket}
    assert sizes == {"1.0": 1, "2.0": 1, "4.0": 2, "8.0": 4, "+Inf": 5}
    assert found["cliptune_inference_batch_items_sum", "cells:1", "image"] == 40
    assert found["cliptune_inference_shed_requests_total",] == 6
    assert found["cliptune_inference_cache_hits_total",] == 8
    assert found["cliptune_job_events_total",] == 99
    assert found["cliptune_job_watchers",] == 7
    assert {state: found["cliptune_jobs", state] for state in JOB_STATES} == {
        **dict.fromkeys(JOB_STATES, 0),
        "RUNNING": 1,
        "QUEUED": 4,
    }


def test_an_engine_that_does_not_answer_has_no_queues_and_is_not_ready() -> None:
    found = series(busy().render(EngineReading(restarts=3), JOBS))
    assert found["cliptune_engine_ready",] == 0
    assert not [key for key in found if key[0].startswith("cliptune_inference_items")]


async def test_requests_are_counted_by_their_route_so_that_labels_stay_few() -> None:
    from cliptune_server.gateway.app import build_app

    metrics = Metrics()
    app = build_app(bare_context(metrics=metrics))

    @app.get("/items/{item}")
    async def item(item: str) -> str:
        return item

    async with client_of(app) as client:
        answers: list[httpx.Response] = [
            await client.get(path) for path in ("/items/a", "/items/b", "/nowhere/1", "/nowhere/2")
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 404]
    found = series(metrics.render(EngineReading(), JobReading()))
    assert found["cliptune_http_requests_total", "GET", "/items/{item}", "200"] == 2
    assert found["cliptune_http_requests_total", "GET", "unmatched", "404"] == 2
    assert found["cliptune_http_duration_seconds_count", "GET", "/items/{item}"] == 2
