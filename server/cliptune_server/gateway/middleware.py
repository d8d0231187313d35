"""What surrounds every request: its span, its deadline, the size of its body, its count, its last resort.

ASGI in, ASGI out. `app.py` puts `Surroundings` outside of everything, so that even an exception that no
handler knows becomes a problem+json answer, and `BodyLimit` inside of it.
"""

from __future__ import annotations

import asyncio
import math
import time

from opentelemetry import trace
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cliptune import priority, tracing
from cliptune.errors import CliptuneError, DeadlineExceededError, InvalidInputError, RequestTooLargeError
from cliptune_server.gateway.problems import problem_response, unexpected
from cliptune_server.metrics import Metrics

TIMEOUT_HEADER = "X-Request-Timeout-S"
# What goes to the disk as it comes, and was announced with its size before.
_STREAMED = ("PUT", "/v1/uploads/")
# Parsed, JSON takes some ten times its bytes, and the loop that everyone waits for. Files have forms and
# binary tensors.
_JSON_BYTES = 32 * 1024 * 1024
# Asked every few seconds by machines; a trace of each would drown the others.
_UNTRACED = {"/healthz", "/readyz", "/metrics"}
_TIMEOUT_KEY = "cliptune.timeout_s"


def timeout_of(request: Request) -> float | None:
    """The seconds that this request's caller gave; None: no limit."""
    limit_s: float | None = request.scope.get(_TIMEOUT_KEY)
    return limit_s


def bulk_of(request: Request) -> bool:
    """Whether this request's caller lets others go first. InvalidInputError for an unknown priority."""
    said = request.headers.get(priority.HEADER)
    return said is not None and priority.check(said)


class Surroundings:
    """Span, deadline, metrics and the translation of whatever was not translated inside."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in _UNTRACED:
            await self._counted(scope, receive, send)
            return
        headers = [(key.decode("latin-1"), value) for key, value in scope["headers"]]
        with tracing.tracer().start_as_current_span(
            scope["method"],
            context=tracing.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.path": scope["path"]},
        ) as span:
            status = await self._counted(scope, receive, send)
            span.update_name(f"{scope['method']} {_route(scope)}")
            span.set_attributes({"http.route": _route(scope), "http.response.status_code": status})
            if status >= 500:
                span.set_status(trace.StatusCode.ERROR)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> int:
        answer = _Answer(send)
        started_s = time.perf_counter()
        try:
            await self._answered(scope, receive, answer)
        finally:
            seconds = None if answer.is_stream else time.perf_counter() - started_s
            # A caller who left before the answer began is nobody's failure.
            self._metrics.observe_http(scope["method"], _route(scope), answer.status or 499, seconds)
        return answer.status

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        path = scope["path"]
        try:
            limit_s = scope[_TIMEOUT_KEY] = _timeout_s(scope)
            async with asyncio.timeout(limit_s) as answer.deadline:
                await self._app(scope, receive, answer)
            return
        except CliptuneError as told:
            error = told
        except TimeoutError as late:
            expired = answer.deadline is not None and answer.deadline.expired()
            error = (
                DeadlineExceededError(f"not answered within {limit_s} s", limit_s=limit_s)
                if expired
                else unexpected(late, path)
            )
        except Exception as bug:  # the last resort: whoever asked is answered
            error = unexpected(bug, path)
        if not answer.status:
            answer.deadline = None
            await problem_response(error, path)(scope, receive, answer)


class _Answer:
    """`send` that notes the status; the deadline is kept once the answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.is_stream = False
        self.deadline: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_stream = any(
                key.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for key, value in message.get("headers", ())
            )
            if self.deadline is not None and not self.deadline.expired():
                self.deadline.reschedule(None)
        await self._send(message)


class BodyLimit:
    """Refuses a body beyond the limit: by its Content-Length at once, otherwise as soon as it is too long.

    Files of an upload are not held in memory and have their own limit.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or (scope["method"], scope["path"][: len(_STREAMED[1])]) == _STREAMED:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        told = headers.get(b"content-length", b"")
        is_json = headers.get(b"content-type", b"").lower().startswith(b"application/json")
        limit = min(_JSON_BYTES, self._max_body_bytes) if is_json else self._max_body_bytes
        if told.isdigit() and int(told) > limit:
            raise _too_large(limit, is_json=is_json)
        received_bytes = 0

        async def receive_within() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > limit:
                raise _too_large(limit, is_json=is_json)
            return message

        await self._app(scope, receive_within, send)


def _too_large(limit: int, *, is_json: bool) -> RequestTooLargeError:
    what = "a JSON body" if is_json else "a request body"
    return RequestTooLargeError(f"{what} may hold {limit} bytes", limit=limit)


def _route(scope: Scope) -> str:
    """The template of the path, known once the router has seen it."""
    route = scope.get("route")
    return str(getattr(route, "path", "unmatched"))


def _timeout_s(scope: Scope) -> float | None:
    """The caller's deadline in seconds from now; None without one. InvalidInputError for what is no time."""
    value = dict(scope["headers"]).get(TIMEOUT_HEADER.lower().encode())
    if value is None:
        return None
    text = value.decode("latin-1")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidInputError(
            f"{TIMEOUT_HEADER} must be seconds above 0, not {text!r}", path=TIMEOUT_HEADER
        )
    return seconds
