"""A loopback OTLP collector: takes spans over HTTP as the standard says and remembers them.

with Collector() as collector:
    ... a process with collector.environment() ...
    spans = collector.wait_for(lambda spans: any(span.name == "..." for span in spans))
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedSpan:
    """A span as it came in; ids in hex, `parent_id` empty for a root."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    service: str
    resource: dict[str, Any]
    attributes: dict[str, Any]
    status_code: int


class Collector:
    """Listens on a free port from entry to exit. `status` is what it answers with (503: out of order)."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.requests = 0
        self._spans: list[ReceivedSpan] = []
        self._arrived = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector._take(self.path, body)
                self.send_response(collector.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """Base address, for OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What makes a process export here, promptly."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All that came so far."""
        with self._arrived:
            return list(self._spans)

    def wait_for(
        self, done: Callable[[list[ReceivedSpan]], bool], timeout_s: float = 30.0
    ) -> list[ReceivedSpan]:
        """The spans, once `done` says that they are all there. AssertionError with their names otherwise."""
        limit_s = time.monotonic() + timeout_s
        with self._arrived:
            while not done(self._spans):
                left_s = limit_s - time.monotonic()
                if left_s <= 0 or not self._arrived.wait(left_s):
                    names = [f"{span.service}: {span.name}" for span in self._spans]
                    raise AssertionError(f"not all spans came within {timeout_s} s, only {names}")
            return list(self._spans)

    def _take(self, path: str, body: bytes) -> None:
        with self._arrived:
            self.requests += 1
            if self.status == 200:
                assert path == "/v1/traces", path
                message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
                self._spans += _spans(message)
            self._arrived.notify_all()


def _spans(message: trace_service_pb2.ExportTraceServiceRequest) -> list[ReceivedSpan]:
    found = []
    for group in message.resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            found += [
                ReceivedSpan(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    kind=span.kind,
                    service=str(resource.get("service.name", "")),
                    resource=resource,
                    attributes=_attributes(span.attributes),
                    status_code=span.status.code,
                )
                for span in scope.spans
            ]
    return found


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}
