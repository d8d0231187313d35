"""Bytes that are no message of their method are the caller's fault, and told like any other.

Enters: a method's handler. Leaves: one that reads its messages inside the call, where errors are translated;
gRPC itself would say UNKNOWN, and write a traceback into the log for each. The innermost interceptor of the
server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from cliptune.errors import InvalidInputError
from cliptune_server.rpc.interceptor import KINDS, Handler


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a message until its handler is called."""

    why: str


class ReadableMessages(grpc.aio.ServerInterceptor):
    """`InvalidInputError` for a message that cannot be read."""

    async def intercept_service(  # noqa: D102
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        kind = KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        behaviour = getattr(handler, kind)
        read = _all_readable if handler.request_streaming else _readable
        return cast(
            "Handler",
            make(
                lambda request, context: behaviour(read(request), context),
                _tolerant(handler.request_deserializer),
                handler.response_serializer,
            ),
        )


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Unreadable(str(error))

    return read


def _readable(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        raise InvalidInputError(f"the message cannot be read: {request.why}")
    return request


async def _all_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)
