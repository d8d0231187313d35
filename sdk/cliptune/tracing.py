"""Trace context (W3C) across our own borders: gRPC metadata, HTTP headers, a child's environment.

Only the OpenTelemetry API: without an SDK configured by the application (or by `telemetry.configure_tracing`
in our own processes) every span is a no-op and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR: Final = TraceContextTextMapPropagator()
_KEYS: Final = ("traceparent", "tracestate")

Pair = tuple[str, str | bytes]


def tracer() -> trace.Tracer:
    """The tracer of all cliptune spans."""
    return trace.get_tracer("cliptune")


def inject(metadata: Iterable[Pair] | None = None, context: Context | None = None) -> tuple[Pair, ...]:
    """gRPC metadata or HTTP headers with the current (or the given) trace context added."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    others = tuple(pair for pair in metadata or () if pair[0] not in carrier)
    return (*others, *carrier.items())


def extract(metadata: Iterable[Pair] | None) -> Context:
    """The trace context that gRPC metadata or HTTP headers carry; an empty one when they carry none."""
    carrier: dict[str, str] = {}
    for key, value in metadata or ():
        if key.lower() in _KEYS:
            carrier[key.lower()] = value.decode("latin-1") if isinstance(value, bytes) else value
    return _PROPAGATOR.extract(carrier, Context())


def inject_environment(context: Context | None = None) -> dict[str, str]:
    """TRACEPARENT and TRACESTATE for a child process; empty outside of a trace."""
    return {key.upper(): str(value) for key, value in inject(context=context)}


def extract_environment(environ: Mapping[str, str]) -> Context:
    """The trace context that a parent process handed over."""
    return extract((key, environ[key.upper()]) for key in _KEYS if key.upper() in environ)
