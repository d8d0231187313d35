"""A span and a count for every gRPC call.

Enters: a call with the client's trace context in its metadata. Leaves: a server span that continues it and is
the current one for everything below, and `observe(method, code, seconds)` when the call has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode

from cliptune import tracing
from cliptune_server.rpc.interceptor import AroundInterceptor, Context, Method

# Codes that are the server's fault: the others say something about the request.
_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


class TelemetryInterceptor(AroundInterceptor):
    """Outermost: sees the status that the others decided on."""

    def __init__(self, observe: Callable[[str, str, float | None], None]) -> None:
        self._observe = observe

    @asynccontextmanager
    async def around(self, method: Method, context: Context) -> AsyncIterator[None]:
        """One call."""
        attributes = {"rpc.system": "grpc", "rpc.service": method.service, "rpc.method": method.name}
        metadata = tuple(context.invocation_metadata() or ())
        parent = tracing.extract((key, value) for key, value in metadata)
        span = tracing.tracer().start_span(
            str(method), context=parent, kind=SpanKind.SERVER, attributes=attributes
        )
        # Never detached: a call has a task, and so a context, of its own, and a stream that is cut off is
        # closed by another task.
        otel_context.attach(trace.set_span_in_context(span))
        began_s = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield
        except grpc.aio.AbortError:
            code = _code(context)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            code = grpc.StatusCode.INTERNAL
            raise
        finally:
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            if code in _FAULTS:
                span.set_status(StatusCode.ERROR, code.name)
            span.end()
            self._observe(str(method), code.name, None if method.streams else time.monotonic() - began_s)


def _code(context: Context) -> grpc.StatusCode:
    """Status of an aborted call; grpc.aio gives its number."""
    code: object = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return _BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN) if isinstance(code, int) else grpc.StatusCode.UNKNOWN
