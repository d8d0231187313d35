"""Exceptions of servicers as gRPC statuses, in one place; and the end of calls that a stop cuts off.

Enters: whatever a handler raises. Leaves: the status of the error table with `google.rpc.ErrorInfo` in the
trailing metadata, never UNKNOWN. What is no error of ours is a bug: INTERNAL, and its traceback in the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc

from cliptune.durable import is_disk_full
from cliptune.errors import (
    CancelledError,
    CliptuneError,
    DeadlineExceededError,
    DiskFullError,
    InternalError,
    UnavailableError,
    wire_status,
)
from cliptune.wire import DETAILS_KEY, error_from_rpc, status_details, status_message
from cliptune_server.rpc.interceptor import AroundInterceptor, Context, Method

_log = logging.getLogger(__name__)

# A cancellation is repeated: one that falls into code of gRPC itself may be swallowed there.
_RECUT_S: Final = 1.0
# Ends when the client says so, and nobody depends on it: a stop does not wait.
_REFLECTION: Final = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def translate(error: BaseException) -> CliptuneError:
    """The error that an exception means to a caller."""
    if isinstance(error, CliptuneError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return error_from_rpc(error)
    if isinstance(error, TimeoutError):
        return DeadlineExceededError(str(error) or "not done in time")
    if isinstance(error, asyncio.CancelledError):
        return CancelledError("the work was given up")
    if isinstance(error, OSError) and is_disk_full(error):
        return DiskFullError(f"no space left: {error}")
    return InternalError(f"a bug of the server, see its log: {type(error).__name__}: {error}")


class ErrorInterceptor(AroundInterceptor):
    """Translates errors, and knows the calls in flight so that a stop can end them with an answer."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[None], Method] = {}
        self._ended: set[str] = set()
        """Methods whose calls a stop does not wait for."""
        self._stopping = False

    @asynccontextmanager
    async def around(self, method: Method, context: Context) -> AsyncIterator[None]:
        """One call."""
        task = asyncio.current_task()
        if task is None:
            raise InternalError("a call runs outside of a task")
        self._calls[task] = method
        try:
            if self._stopping:
                raise UnavailableError("the daemon is stopping")
            yield
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError as cancelled:
            if context.done() or (task.cancelling() and not self._stopping):
                raise  # the client has gone or its deadline passed: it knows
            task.uncancel()
            if self._stopping:
                await _abort(context, UnavailableError("the daemon stopped before this was answered"))
            await _abort(context, translate(cancelled))
        except Exception as error:
            told = translate(error)
            if isinstance(told, InternalError):
                _log.error("%s failed", method, exc_info=error)
            await _abort(context, told)
        finally:
            self._calls.pop(task, None)

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, wait `grace_s` for those in flight, and fail the rest with UNAVAILABLE."""
        self._stopping = True
        self.cut_off(_REFLECTION)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + grace_s
        while self._calls and loop.time() < until_s:
            await asyncio.wait(list(self._calls), timeout=min(_RECUT_S, until_s - loop.time()))
            self._cut_off_ended()
        if self._calls:
            _log.warning("%d calls were not answered within %.0f s", len(self._calls), grace_s)
            self._ended.update(map(str, self._calls.values()))
            self._cut_off_ended()
            await asyncio.wait(list(self._calls), timeout=1.0)

    def cut_off(self, method: str) -> None:
        """Fail the calls of one method with UNAVAILABLE now; only while draining."""
        self._ended.add(method)
        self._cut_off_ended()

    def _cut_off_ended(self) -> None:
        for call, method in self._calls.items():
            if str(method) in self._ended:
                call.cancel()


async def _abort(context: Context, error: CliptuneError) -> None:
    earlier = tuple(context.trailing_metadata() or ())
    await context.abort(
        wire_status(error).grpc,
        status_message(error),
        (*earlier, (DETAILS_KEY, status_details(error))),
    )
