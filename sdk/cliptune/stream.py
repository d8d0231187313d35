"""An open stream of answers, sync and async: errors translated, span ended, cancelled when it is left."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Final

import grpc
import grpc.aio
from opentelemetry import trace

from cliptune.channel import end_span
from cliptune.errors import CliptuneError

Translate = Callable[[grpc.RpcError], CliptuneError]


class Stream:
    """A streaming call of `grpc`. Its answers are read once."""

    def __init__(self, call: Any, span: trace.Span, translate: Translate) -> None:
        self._call: Final = call
        self._span: Final = span
        self._translate: Final = translate

    def answers(self) -> Generator[Any]:
        """Raises `CliptuneError`; leaving it early cancels the call."""
        failed: CliptuneError | None = None
        try:
            yield from self._call
        except grpc.RpcError as error:
            failed = self._translate(error)
            raise failed from None
        finally:
            self._call.cancel()
            end_span(self._span, failed)

    def cancel(self) -> None:
        """End the call from another thread."""
        self._call.cancel()


class AsyncStream:
    """A streaming call of `grpc.aio`. Its answers are read once."""

    def __init__(self, call: Any, span: trace.Span, translate: Translate) -> None:
        self._call: Final = call
        self._span: Final = span
        self._translate: Final = translate

    async def answers(self) -> AsyncGenerator[Any]:
        """Raises `CliptuneError`; leaving it early cancels the call."""
        failed: CliptuneError | None = None
        try:
            async for answer in self._call:
                yield answer
        except grpc.aio.AioRpcError as error:
            failed = self._translate(error)
            raise failed from None
        finally:
            self._call.cancel()
            end_span(self._span, failed)

    def cancel(self) -> None:
        """End the call from another task."""
        self._call.cancel()
