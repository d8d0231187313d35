"""A client's call is a span of the caller's trace, and the server is told to go on from it."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cliptune import Client, UnavailableError
from cliptune.v1 import job_pb2, training_pb2
from tests.sdk.peer import last_event, running_peer

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
told = []

def get(request, context, attempt):
    told.append(dict(context.invocation_metadata())["traceparent"])
    return training_pb2.GetJobResponse(job=job_pb2.Job(id="j"))

def watch(request, context, attempt):
    told.append(dict(context.invocation_metadata())["traceparent"])
    yield last_event(1)

with running_peer() as peer, Client(peer.address, attempts=1) as client:
    peer.handlers.update(GetJob=get, WatchJob=watch)
    with trace.get_tracer("caller").start_as_current_span("caller"):
        client.get_job("j")
        list(client.watch_job("j"))
        try:
            client.list_models()
        except UnavailableError:
            pass
spans = [
    [
        s.name,
        s.context.trace_id,
        s.context.span_id,
        s.parent and s.parent.span_id,
        s.attributes.get("error.type"),
    ]
    for s in exporter.get_finished_spans()
]
print(json.dumps([spans, told]))
"""


def test_unary_calls_and_streams_are_spans_below_the_caller_s() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=60
    )
    spans, told = json.loads(shown.stdout)
    by_name = {span[0]: span for span in spans}
    caller = by_name["caller"]
    get, watch, models = (
        by_name[f"cliptune.v1.{method}"]
        for method in ("TrainingService/GetJob", "TrainingService/WatchJob", "ModelService/ListModels")
    )
    for span in (get, watch, models):
        assert span[1] == caller[1]
        assert span[3] == caller[2]
    assert [parent[:-3] for parent in told] == [f"00-{span[1]:032x}-{span[2]:016x}" for span in (get, watch)]
    assert [get[4], watch[4], models[4]] == [None, None, "UnavailableError"]
