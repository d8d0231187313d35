"""A small OTLP/HTTP collector: hands over each span that a process exports."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """`address` for OTEL_EXPORTER_OTLP_ENDPOINT; `spans_until` waits."""

    def __init__(self, address: str, arrived: queue.Queue[Span]) -> None:
        self.address = address
        self._arrived = arrived
        self.spans: list[Span] = []

    def spans_until(self, name: str, trace_id: bytes) -> list[Span]:
        """All spans of a trace, when one with this name has arrived."""
        while not any(span.name == name and span.trace_id == trace_id for span in self.spans):
            self.spans.append(self._arrived.get(timeout=30))
        return [span for span in self.spans if span.trace_id == trace_id]


@contextmanager
def collecting() -> Iterator[Collector]:
    arrived: queue.Queue[Span] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        arrived.put(span)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Collector(f"http://127.0.0.1:{server.server_address[1]}", arrived)
        finally:
            server.shutdown()
