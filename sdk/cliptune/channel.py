"""The connection to a daemon: its options, which calls are sent again, what a failure means to the user.

In: an address and how often to try. Out: options for `grpc` and `grpc.aio` channels alike. Called by `Client`
and `AsyncClient`; nothing else in the SDK opens a channel.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from opentelemetry import trace

from cliptune.codec import Request
from cliptune.errors import (
    CliptuneError,
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    RequestTooLargeError,
    UnavailableError,
)
from cliptune.tracing import Pair, inject, tracer
from cliptune.wire import error_from_rpc

PACKAGE: Final = "cliptune.v1"
DEFAULT_TIMEOUT_S: Final = 60.0
DEFAULT_ATTEMPTS: Final = 4

# Sending one of these twice does what sending it once does: CreateJob carries an idempotency key. A command
# to a job, a deletion or an unload is not among them; its second sending would be answered as an error.
SAFE_METHODS: Final = (
    "TrainingService/CreateJob",
    "TrainingService/GetJob",
    "TrainingService/ListJobs",
    "ModelService/ListModels",
    "ModelService/GetModel",
    "ModelService/LoadModel",
    "ModelService/SetAlias",
    "ModelService/SetTraffic",
    "DataService/ListDatasets",
    "DataService/GetDataset",
    "InferenceService/EmbedImages",
    "InferenceService/EmbedTexts",
    "InferenceService/Similarity",
    "InferenceService/ScorePairs",
    "InferenceService/Classify",
)
# What the daemon accepts in one message.
_MESSAGE_BYTES: Final = 256 * 1024 * 1024
# What grpc.aio says of a write to a stream whose peer has gone, whatever the stream's own status is.
_LOST_WHILE_WRITING: Final = "Internal error from Core"
# A stream may be silent for hours; one that stood longer than an attempt to connect (20 s) was accepted.
_ACCEPTED_AFTER_S: Final = 30.0


def channel_options(attempts: int) -> list[tuple[str, Any]]:
    """Options of a channel that tries a safe call up to `attempts` times (1 to 5) while it is UNAVAILABLE."""
    if not 1 <= attempts <= 5:
        raise InvalidInputError(f"attempts is {attempts}; allowed: 1 to 5", allowed="1 to 5")
    return [
        ("grpc.max_send_message_length", _MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        # A call is sent again only while it fits this buffer whole; the default holds no photo.
        ("grpc.per_rpc_retry_buffer_size", _MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A daemon that comes back is to be found soon; it is mostly on this machine.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.service_config", json.dumps(service_config(attempts))),
    ]


def service_config(attempts: int) -> dict[str, Any]:
    """gRPC's own retries, for the safe methods alone. The waits are 0.1 to 3 s, about 2 s in all."""
    if attempts == 1:
        return {"methodConfig": []}
    names = [method.split("/") for method in SAFE_METHODS]
    return {
        "methodConfig": [
            {
                "name": [{"service": f"{PACKAGE}.{service}", "method": method} for service, method in names],
                "retryPolicy": {
                    "maxAttempts": attempts,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "3s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }


def failure(error: grpc.RpcError, address: str, method: str, timeout_s: float | None) -> CliptuneError:
    """What a failed call means to the user, with what only the client knows."""
    known = error_from_rpc(error)
    if known.metadata:
        return known
    if type(known) is UnavailableError and "connect" in known.message.lower():
        return UnavailableError(
            f"no daemon answers at {address} (start one: cliptune serve): {known.message}", address=address
        )
    if type(known) is InternalError and known.message == _LOST_WHILE_WRITING:
        return UnavailableError("the daemon went away while a stream was written to", address=address)
    if type(known) is OverloadedError and "larger than max" in known.message:  # gRPC's own limit, either side
        return RequestTooLargeError(known.message, limit=_MESSAGE_BYTES)
    if type(known) is DeadlineExceededError and timeout_s is not None:
        return DeadlineExceededError(f"{method} was not answered within {timeout_s:g} s", timeout_s=timeout_s)
    return known


@dataclass(kw_only=True, slots=True)
class Patience:
    """How long a broken stream is taken up again: pure bookkeeping, the caller waits."""

    limit_s: float
    """Since the stream was lost."""
    lost_s: float | None = None
    opened_s: float = 0.0
    failures: int = 0

    def opened(self) -> None:
        """The stream was asked for."""
        self.opened_s = time.monotonic()

    def heard(self) -> None:
        """The daemon answered."""
        self.failures, self.lost_s = 0, None

    def wait_s(self, error: UnavailableError) -> float:
        """How long to wait before the next try: 0.1 s, doubling to 2 s, jittered.

        Raises `error` past the limit.
        """
        now_s = time.monotonic()
        if now_s - self.opened_s > _ACCEPTED_AFTER_S:
            self.heard()
        self.lost_s = now_s if self.lost_s is None else self.lost_s
        if now_s - self.lost_s >= self.limit_s:
            raise error
        self.failures += 1
        return float(min(2.0, 0.05 * 2**self.failures) * random.uniform(0.75, 1.25))


def serialize(message: Request) -> bytes:
    """A message's bytes."""
    return message.SerializeToString()


def method_path(method: str) -> str:
    """ "Service/Method" of cliptune.v1, or of the package that it names, as gRPC writes it."""
    return f"/{method}" if method.startswith("grpc.") else f"/{PACKAGE}.{method}"


@contextmanager
def call_span(method: str) -> Iterator[tuple[Pair, ...]]:
    """A client span around one call, the current one inside; gives the metadata for the server's spans."""
    with tracer().start_as_current_span(
        method_path(method)[1:],
        kind=trace.SpanKind.CLIENT,
        attributes=_attributes(method),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield inject()
        except CliptuneError as error:
            _mark(span, error)
            raise


def start_span(method: str) -> trace.Span:
    """A client span for a stream, which outlives the function that opens it; `end_span` ends it."""
    return tracer().start_span(
        method_path(method)[1:], kind=trace.SpanKind.CLIENT, attributes=_attributes(method)
    )


def span_metadata(span: trace.Span) -> tuple[Pair, ...]:
    """What the server needs to hang its spans below this one."""
    return inject(context=trace.set_span_in_context(span))


def end_span(span: trace.Span, error: CliptuneError | None = None) -> None:
    """Ends a stream's span, with its error if it had one."""
    if error is not None:
        _mark(span, error)
    span.end()


def _attributes(method: str) -> dict[str, str]:
    service, _, name = method_path(method)[1:].partition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


def _mark(span: trace.Span, error: CliptuneError) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(trace.Status(trace.StatusCode.ERROR, error.message))
