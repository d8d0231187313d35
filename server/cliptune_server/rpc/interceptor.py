"""A server interceptor that runs each handler, of all four kinds, inside an async context manager.

Enters: any registered method. Leaves: the same method, entered and left through `around`. Errors, traces and
metrics are written once on top of it (`errors.py`, `telemetry.py`).
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable when it runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A method as it was called."""

    service: str
    """ "cliptune.v1.InferenceService"."""
    name: str
    """ "EmbedTexts"."""
    streams: bool
    """Either side sends more than one message."""

    def __str__(self) -> str:
        return f"{self.service}/{self.name}"


class AroundInterceptor(ABC, grpc.aio.ServerInterceptor):
    """Subclasses say what happens around a call. The first interceptor of a server is the outermost."""

    @abstractmethod
    def around(self, method: Method, context: Context) -> AbstractAsyncContextManager[None]:
        """Entered before the handler, left after its last message; runs in the call's own task."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler. An unknown method has none, and gRPC answers it with UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        service, _, name = handler_call_details.method.lstrip("/").rpartition("/")
        streams = bool(handler.request_streaming or handler.response_streaming)
        method = Method(service=service, name=name, streams=streams)
        wrap = self._stream if handler.response_streaming else self._unary
        kind = KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        behaviour = getattr(handler, kind)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return cast(
            "Handler",
            make(wrap(method, behaviour), handler.request_deserializer, handler.response_serializer),
        )

    def _unary(self, method: Method, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self.around(method, context):
                return await behaviour(request, context)

        return call

    def _stream(self, method: Method, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self.around(method, context):
                answers = behaviour(request, context)
                if inspect.isawaitable(answers):  # it sends by context.write
                    await answers
                    return
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        yield answer

        return call


KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
