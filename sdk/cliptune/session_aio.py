"""One stream that watches and controls many jobs: its asynchronous form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Final, Self

from cliptune.errors import CancelledError, CliptuneError
from cliptune.job import CommandReceipt, JobEvent
from cliptune.session import SessionBook
from cliptune.v1 import job_pb2, training_pb2


class AsyncSession:
    """Watches and controls many jobs over one stream. Made by `AsyncClient.session()`, for `async with`.

    The same methods as `Session`, awaited; `async for event in session` ends when every watched job has.
    """

    def __init__(self, open_stream: Callable[[AsyncIterator[Any]], Any]) -> None:
        self._open_stream: Final = open_stream
        self._book: Final = SessionBook()
        self._requests: Final[asyncio.Queue[training_pb2.SessionRequest | None]] = asyncio.Queue()
        self._events: Final[asyncio.Queue[JobEvent | CliptuneError | None]] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._ended = False

    async def watch(self, job_id: str, *, after: int = 0) -> None:
        """Begin to watch a job: events with a number greater than `after`. `JobNotFoundError`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._send(self._book.watch(waiter, job_id, after))
        try:
            await waiter
        except CliptuneError:
            self._book.refused(job_id)
            raise

    async def unwatch(self, job_id: str) -> None:
        """Stop watching a job; events on their way may still come."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._send(self._book.unwatch(waiter, job_id))
        await waiter
        self._wake_when_idle()

    async def control(self, job_id: str, command: job_pb2.JobCommand) -> CommandReceipt:
        """Send a command (`pause()`, `resume()`, ...); returns when the job has carried it out."""
        waiter: asyncio.Future[CommandReceipt] = asyncio.get_running_loop().create_future()
        self._send(self._book.control(waiter, job_id, command))
        return await waiter

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        """Events of all watched jobs; ends when none of them can bring any more."""
        while not (self._book.idle and self._events.empty()):
            event = await self._events.get()
            if isinstance(event, CliptuneError):
                raise event
            if event is not None:
                yield event

    async def close(self) -> None:
        """End the stream."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read(), name="cliptune-session")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _send(self, request: training_pb2.SessionRequest) -> None:
        if self._ended or self._reader is None:
            raise CancelledError("the session is over" if self._ended else "use the session in `async with`")
        self._requests.put_nowait(request)

    async def _outgoing(self) -> AsyncIterator[training_pb2.SessionRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        error: CliptuneError = CancelledError("the session is over")
        try:
            async for answer in self._open_stream(self._outgoing()).answers():
                event = self._book.accept(answer)
                if event is not None:
                    self._events.put_nowait(event)
                self._wake_when_idle()
        except CliptuneError as failure:
            error = failure
        finally:
            self._ended = True
            self._book.end(error)
            self._events.put_nowait(error)

    def _wake_when_idle(self) -> None:
        if self._book.idle:
            self._events.put_nowait(None)
