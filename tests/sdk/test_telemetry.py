"""Logs and traces of a real process, against a real loopback collector."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from cliptune.errors import InvalidInputError
from cliptune.telemetry import RepeatFilter, configure_logging, exporter_names
from tests.support.collector import Collector

PROGRAM = """
import logging, sys
import structlog
from opentelemetry import trace
from cliptune.telemetry import configure_logging, configure_tracing

configure_logging("info", "daemon")
shutdown = configure_tracing("cliptune-daemon")
with trace.get_tracer("test").start_as_current_span("work"):
    with structlog.contextvars.bound_contextvars(job_id="job-1"):
        structlog.get_logger("cliptune_server.training.jobs").info("queued", loss=float("nan"), position=2)
        logging.getLogger("uvicorn.error").warning("standard %s", "library", extra={"port": 8000})
        try:
            1 / 0
        except ZeroDivisionError:
            logging.getLogger("grpc").exception("failed")
logging.getLogger("sqlalchemy.engine").info("SELECT 1")
{more}
shutdown()
"""
HEX_32 = re.compile(r"[0-9a-f]{32}")


def run(more: str = "", **environment: str) -> tuple[list[dict[str, Any]], float]:
    """Log lines of the program, and its seconds after the imports."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.replace("{more}", more)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**inherited, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "stdout belongs to machine-readable lines"
    return [json.loads(line) for line in done.stderr.splitlines()], time.monotonic() - began_s


def test_every_log_line_is_json_with_trace_and_job_ids_whoever_wrote_it() -> None:
    lines, _ = run()
    assert [line["event"] for line in lines] == ["queued", "standard library", "failed"]
    for line in lines:
        assert line["job_id"] == "job-1"
        assert line["service"] == "daemon"
        assert HEX_32.fullmatch(line["trace_id"])
        assert re.fullmatch(r"[0-9a-f]{16}", line["span_id"])
        assert line["timestamp"].endswith("Z")
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert [line["logger"] for line in lines] == ["cliptune_server.training.jobs", "uvicorn.error", "grpc"]
    assert lines[0]["loss"] == "nan"
    assert lines[1]["port"] == 8000
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_spans_arrive_at_the_collector_that_the_variables_name() -> None:
    with Collector() as collector:
        lines, _ = run(OTEL_RESOURCE_ATTRIBUTES="deployment=test", **collector.environment())
        (span,) = collector.wait_for(lambda spans: bool(spans))
    assert span.name == "work"
    assert span.trace_id == lines[0]["trace_id"]
    assert span.service == "cliptune-daemon"
    assert span.resource["deployment"] == "test"


def test_a_service_name_of_the_users_own_wins_and_the_process_is_still_told() -> None:
    with Collector() as collector:
        run(
            OTEL_SERVICE_NAME="theirs",
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.endpoint}/v1/traces",
        )
        (span,) = collector.wait_for(lambda spans: bool(spans))
    assert span.service == "theirs"
    assert span.resource["cliptune.process"] == "cliptune-daemon"


@pytest.mark.parametrize("off", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_spans_go_nowhere_when_a_variable_turns_them_off(off: dict[str, str]) -> None:
    with Collector() as collector:
        run(**collector.environment(), **off)
        assert collector.requests == 0


def test_a_failing_collector_costs_one_line_and_no_time() -> None:
    many = 'for _ in range(2000):\n    trace.get_tracer("test").start_span("more").end()'
    with Collector(status=400) as collector:
        lines, seconds = run(many, **collector.environment())
        assert collector.requests > 1
    told = [line for line in lines if line["logger"].startswith("opentelemetry")]
    assert len(told) == 1
    assert seconds < 15


def test_a_collector_that_is_away_holds_up_the_end_for_three_seconds_at_most() -> None:
    lines, seconds = run(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert lines[0]["event"] == "queued"
    assert seconds < 15


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ("otlp",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, ("otlp",)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, ()),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ("otlp",)),
        ({"OTEL_TRACES_EXPORTER": "console"}, ("console",)),
        ({"OTEL_TRACES_EXPORTER": "otlp, console,otlp"}, ("otlp", "console")),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ()),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, ()),
    ],
)
def test_the_standard_variables_choose_the_exporter(
    variables: dict[str, str], names: tuple[str, ...]
) -> None:
    assert exporter_names(variables) == names


def test_a_repeated_message_passes_once_in_its_interval_and_others_pass_always() -> None:
    import logging

    quiet = RepeatFilter(("opentelemetry",), interval_s=3600)

    def passes(name: str, line: int) -> bool:
        return quiet.filter(logging.LogRecord(name, logging.ERROR, "f.py", line, "message", (), None))

    assert passes("opentelemetry.sdk", 1)
    assert not passes("opentelemetry.sdk", 1)
    assert passes("opentelemetry.sdk", 2)
    assert passes("cliptune_server", 1)
    assert passes("cliptune_server", 1)


def test_an_unknown_log_level_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="'loud' is none of debug, info, warning, error"):
        configure_logging("loud")
