"""One bidirectional stream that watches and controls any number of jobs.

Enters: `SessionRequest` messages in any order. Leaves: `SessionResponse` messages: events of every watch,
answers under the requests' own ids. Made by `TrainingServicer.Session`, one for each stream. A request that
fails is answered and the stream goes on; a stopping daemon ends the stream itself, so that the client dials
again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, Final

from cliptune.errors import CliptuneError, ConflictError, InvalidInputError, UnavailableError, to_detail
from cliptune.v1 import training_pb2
from cliptune_server.training.jobs import Jobs

# A client that reads slowly holds back its watches, which then read from the log's file.
_WAITING_RESPONSES: Final = 64


class TrainingSession:
    """What runs for one stream."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._waiting: asyncio.Queue[training_pb2.SessionResponse | Exception | None] = asyncio.Queue(
            _WAITING_RESPONSES
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def responses(
        self, requests: AsyncIterator[training_pb2.SessionRequest]
    ) -> AsyncIterator[training_pb2.SessionResponse]:
        """Everything to send, until the client has said its last and every watch and command is done."""
        self._start(self._read(requests))
        while (response := await self._waiting.get()) is not None:
            if isinstance(response, Exception):
                raise response
            yield response

    async def close(self) -> None:
        """Ends what still runs."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._supervised(work))
        self._tasks.add(task)
        return task

    async def _supervised(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.current_task()
        assert task is not None  # we are in one
        try:
            await work
        except Exception as error:
            await self._waiting.put(error)
        finally:
            self._tasks.discard(task)
        if not self._tasks:
            await self._waiting.put(None)

    async def _read(self, requests: AsyncIterator[training_pb2.SessionRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("action"):
                case "watch":
                    await self._watch(request.request_id, request.watch)
                case "control":
                    self._start(self._answer(request.request_id, self._control(request)))
                case "unwatch_job_id":
                    await self._unwatch(request)
                case _:
                    error = InvalidInputError("a session request without an action")
                    await self._send(request.request_id, error=to_detail(error))

    async def _watch(self, request_id: str, request: training_pb2.WatchJobRequest) -> None:
        if request.job_id in self._watches:
            error = ConflictError(f"this session watches {request.job_id} already", job_id=request.job_id)
            await self._send(request_id, error=to_detail(error))
            return
        self._watches[request.job_id] = self._start(
            self._answer(request_id, self._follow(request_id, request))
        )

    async def _follow(self, request_id: str, request: training_pb2.WatchJobRequest) -> None:
        job_id = request.job_id
        try:
            await self._jobs.get(job_id)
            await self._send(request_id, done=True)
            async with aclosing(self._jobs.watch(job_id, request.after_number)) as events:
                async for event in events:
                    await self._send("", event=event)
            await self._send("", watch_ended_job_id=job_id)
        finally:
            self._watches.pop(job_id, None)

    async def _unwatch(self, request: training_pb2.SessionRequest) -> None:
        watch = self._watches.pop(request.unwatch_job_id, None)
        if watch is None:
            error = ConflictError(f"this session does not watch {request.unwatch_job_id}")
            await self._send(request.request_id, error=to_detail(error))
            return
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await self._send(request.request_id, done=True)

    async def _control(self, request: training_pb2.SessionRequest) -> None:
        answer = await self._jobs.control(request.control.job_id, request.control.command)
        await self._send(request.request_id, control=answer)

    async def _answer(self, request_id: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except UnavailableError as error:
            await self._waiting.put(error)
        except CliptuneError as error:
            await self._send(request_id, error=to_detail(error))

    async def _send(self, request_id: str, **result: Any) -> None:
        await self._waiting.put(training_pb2.SessionResponse(request_id=request_id, **result))
