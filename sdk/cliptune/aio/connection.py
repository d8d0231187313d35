"""One `grpc.aio` channel to a daemon, and how a call is carried out over it.

The calls of the services (`jobs.py`, `models.py`, ...) are classes over it; `AsyncClient` is all of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc.aio

import cliptune.health as health
from cliptune.address import find_address
from cliptune.channel import (
    DEFAULT_ATTEMPTS,
    DEFAULT_TIMEOUT_S,
    call_span,
    channel_options,
    failure,
    method_path,
    serialize,
    span_metadata,
    start_span,
)
from cliptune.codec import Answer, Call, Request
from cliptune.errors import UnavailableError
from cliptune.priority import Priority
from cliptune.priority import chosen as priority_metadata
from cliptune.results import Health
from cliptune.stream import AsyncStream

Result = TypeVar("Result")


class AsyncConnection:
    """A channel for one event loop, opened at its first call."""

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        attempts: int = DEFAULT_ATTEMPTS,
        priority: Priority | None = None,
    ) -> None:
        """`priority`: "bulk" lets whatever is interactive go first, in every call; None: streams alone do."""
        self.address: Final = address or find_address()
        self._timeout_s: Final = timeout_s
        self._priority: Final = priority_metadata(priority)
        self._options: Final = channel_options(attempts)
        self._opened: grpc.aio.Channel | None = None

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """Whether the daemon is ready: its models answer a canary."""
        return await self._run(health.check(service), timeout_s)

    async def wait_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return when the daemon says SERVING; `DeadlineExceededError` after `timeout_s`."""
        stream = self._open(health.WATCH, health.request(""), health.ANSWER, timeout_s, wait_for_ready=True)
        async with aclosing(stream.answers()) as answers:
            async for answer in answers:
                if health.status(answer) is Health.SERVING:
                    return
        raise UnavailableError(f"the daemon at {self.address} stopped before it was ready")

    async def close(self) -> None:
        """Close the connection; streams that are open end with `CancelledError`."""
        if self._opened is not None:
            await self._opened.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[Result], timeout_s: float | None) -> Result:
        timeout_s = timeout_s or call.timeout_s or self._timeout_s
        carry = self._channel().unary_unary(method_path(call.method), serialize, call.answer.FromString)
        with call_span(call.method) as metadata:
            try:
                answer = await carry(call.request, timeout=timeout_s, metadata=(*metadata, *self._priority))
            except grpc.aio.AioRpcError as error:
                # Not a chain of tracebacks: the failed call says no more. It is the error's `__context__`.
                raise failure(error, self.address, call.method, timeout_s) from None
            return call.parse(answer)

    def _open(
        self,
        method: str,
        request: Request | AsyncIterator[Any],
        answer: Answer,
        timeout_s: float | None = None,
        *,
        wait_for_ready: bool = False,
    ) -> AsyncStream:
        opened: Any = (
            self._channel().stream_stream
            if isinstance(request, AsyncIterator)
            else self._channel().unary_stream
        )
        span = start_span(method)
        call = opened(method_path(method), serialize, answer.FromString)(
            request,
            timeout=timeout_s,
            metadata=(*span_metadata(span), *self._priority),
            wait_for_ready=wait_for_ready,
        )
        return AsyncStream(call, span, lambda error: failure(error, self.address, method, timeout_s))

    def _channel(self) -> grpc.aio.Channel:
        # Opened at the first call, since a channel belongs to the loop that runs then.
        if self._opened is None:
            self._opened = grpc.aio.insecure_channel(self.address, options=self._options)
        return self._opened
