"""One trace from the caller to the forward, and from a job's creation into its trainer process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support import images
from tests.support.collector import Collector, ReceivedSpan
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import write_shapes
from tests.support.models import publish_test_model

# The client is a process of its own: its tracer provider is that of an application.
CLIENT = """
import sys
from cliptune import Client
from cliptune.telemetry import configure_tracing
from cliptune.tracing import tracer

shutdown = configure_tracing("application")
with tracer().start_as_current_span("application.root"), Client(sys.argv[1]) as client:
{body}
shutdown()
"""
EMBED = """
    client.embed_images([sys.argv[2]], model="shapes")
    client.embed_texts(["a red circle"], model="shapes")
"""
TRAIN = """
    spec = {
        "name": "traced",
        "model": {"name": "cliptune-test-vit"},
        "data": {"train": sys.argv[2], "split_column": "split"},
        "train": {"epochs": 1, "batch_size": 6},
        "publish": {"serve": False},
        "resources": {"device": "cpu", "threads": 1},
    }
    job = client.create_job(spec)
    for event in client.watch_job(job.id):
        pass
"""


def run_client(body: str, daemon: RunningDaemon, collector: Collector, argument: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT.replace("{body}", body), daemon.grpc, str(argument)],
        env={**os.environ, **collector.environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def ancestry(span: ReceivedSpan, spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    """From the root to the span."""
    by_id = {each.span_id: each for each in spans}
    line = [span]
    while line[0].parent_id in by_id:
        line.insert(0, by_id[line[0].parent_id])
    return line


def subsequence(wanted: list[str], found: list[str]) -> bool:
    rest = iter(found)
    return all(name in rest for name in wanted)


def named(spans: list[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    return [span for span in spans if span.name == name]


def test_a_call_of_the_sdk_is_one_trace_through_daemon_and_engine(tmp_path: Path) -> None:
    home = tmp_path / "home"
    publish_test_model(home, "shapes", serve=True)
    picture = tmp_path / "red.png"
    picture.write_bytes(images.png())
    with Collector() as collector:
        with running_daemon(home, environment=collector.environment()) as daemon:
            run_client(EMBED, daemon, collector, picture)
        # Everything is flushed once the processes have ended.
        spans = collector.wait_for(
            lambda spans: bool(named(spans, "application.root")) and len(_forwards(spans)) >= 2
        )
    (root,) = named(spans, "application.root")
    trace = [span for span in spans if span.trace_id == root.trace_id]
    forwards = _forwards(trace)
    assert len(forwards) == 2, [span.name for span in trace]
    for forward in forwards:
        line = ancestry(forward, trace)
        assert line[0] == root
        services = list(dict.fromkeys(span.service for span in line))
        assert services == ["application", "cliptune-daemon", "cliptune-engine"]
        assert any(span.name.startswith("router.") for span in line)
    names = {span.name for span in trace}
    assert {"engine.decode", "engine.queue"} <= names


def _forwards(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    """Forwards on behalf of a caller: those of canaries are traces of their own."""
    roots = {span.trace_id for span in named(spans, "application.root")}
    return [span for span in named(spans, "engine.forward") if span.trace_id in roots]


def test_a_request_over_http_continues_the_callers_trace(tmp_path: Path) -> None:
    home = tmp_path / "home"
    publish_test_model(home, "shapes", serve=True)
    trace_id, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    def ours(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        return [span for span in spans if span.trace_id == trace_id]

    with Collector() as collector:
        with running_daemon(home, environment=collector.environment()) as daemon:
            answer = httpx.post(
                f"{daemon.url}/v1/embeddings",
                json={"input": "a red circle"},
                headers={"traceparent": f"00-{trace_id}-{caller}-01"},
                timeout=60,
            )
            assert answer.status_code == 200
            assert httpx.get(f"{daemon.url}/metrics").status_code == 200
        spans = collector.wait_for(
            lambda spans: {"POST /v1/embeddings", "engine.forward"} <= {s.name for s in ours(spans)}
        )
    (server,) = named(ours(spans), "POST /v1/embeddings")
    assert server.parent_id == caller
    assert server.attributes["http.response.status_code"] == 200
    (forward,) = named(ours(spans), "engine.forward")
    line = ancestry(forward, ours(spans))
    assert line[0] == server
    assert subsequence(["POST /v1/embeddings", "router.EmbedTexts"], [span.name for span in line])
    assert not [span for span in spans if "/metrics" in span.name], "a scrape makes no trace"


def test_a_jobs_trace_goes_on_in_its_trainer_process(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "data")
    wanted = {
        "application.root",
        "job.create",
        "job.prepare",
        "job.run",
        "train.epoch",
        "checkpoint",
        "export",
    }

    def ours(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        roots = {span.trace_id for span in named(spans, "application.root")}
        return [span for span in spans if span.trace_id in roots]

    with Collector() as collector:
        with running_daemon(
            tmp_path / "home",
            data_roots=[tmp_path],
            environment=collector.environment(),
            wait_ready=False,
        ) as daemon:
            run_client(TRAIN, daemon, collector, shapes.csv)
        spans = ours(collector.wait_for(lambda spans: wanted <= {span.name for span in ours(spans)}))
    for span in named(spans, "train.epoch"):
        line = ancestry(span, spans)
        assert line[0].name == "application.root"
        assert subsequence(
            ["application", "cliptune-daemon", "cliptune-trainer"], [each.service for each in line]
        )
        assert subsequence(["job.create", "job.run"], [each.name for each in line])
    assert {span.service for span in spans} >= {"application", "cliptune-daemon", "cliptune-trainer"}


@pytest.mark.parametrize("variables", [{}, {"OTEL_SDK_DISABLED": "true"}])
def test_a_daemon_that_nobody_asked_to_export_answers_and_says_nothing_of_telemetry(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    with running_daemon(tmp_path / "home", environment=variables, wait_ready=False) as daemon:
        answer = httpx.get(f"{daemon.url}/v1/jobs", timeout=60)
        assert answer.status_code == 200, answer.text
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    assert lines
    assert not [line for line in lines if line["logger"].startswith("opentelemetry")]


def test_a_collector_that_is_away_disturbs_neither_answers_nor_the_end(tmp_path: Path) -> None:
    home = tmp_path / "home"
    publish_test_model(home, "shapes", serve=True)
    nobody = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "20"}
    with running_daemon(home, environment=nobody) as daemon, httpx.Client(base_url=daemon.url) as rest:
        for _ in range(20):
            assert rest.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    told = [line for line in lines if line["logger"].startswith("opentelemetry")]
    assert len(told) <= 6, "a message each for retry and failure, of daemon and engine, and no more"
