"""Job events as server-sent events.

In: an iterator of JobEvents. Out: frames of text/event-stream: `id` is the event's number, `event` its kind
("progress", "state", ...), `data` its JSON form. The stream closes with an `end` event when the job has
ended, and with an `error` event (a problem) when the daemon stops; after the latter a browser reconnects by
itself, telling in Last-Event-ID what it saw last. Used by the route of `/v1/jobs/{job_id}/events`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Send

from cliptune.errors import CliptuneError, InvalidInputError
from cliptune.v1 import job_pb2
from cliptune.wire import problem
from cliptune_server.gateway.messages import json_form
from cliptune_server.gateway.problems import unexpected

MEDIA_TYPE: Final = "text/event-stream"
# Proxies must pass events on as they come.
HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_RETRY_MS: Final = 1000
_MAX_NUMBER: Final = 2**63 - 1


class EventStream(StreamingResponse):
    """An answer of frames. However it ends, the watch below it is closed at once."""

    media_type = MEDIA_TYPE

    def __init__(self, content: AsyncGenerator[str]) -> None:
        super().__init__(content, headers=HEADERS)
        self._content = content

    async def stream_response(self, send: Send) -> None:
        """Send until the frames or the client end."""
        async with aclosing(self._content):
            await super().stream_response(send)


def frame(event: str, data: dict[str, Any], *, number: int | None = None) -> str:
    """One event of the stream."""
    lines = [] if number is None else [f"id: {number}"]
    lines += [f"event: {event}", f"data: {json.dumps(data, allow_nan=False)}"]
    return "\n".join(lines) + "\n\n"


def after_number(last_event_id: str | None, after: int) -> int:
    """Where a watch goes on: after what a reconnecting browser saw last, otherwise where the query says."""
    if not last_event_id:
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit() and int(last_event_id) <= _MAX_NUMBER):
        raise InvalidInputError(f"Last-Event-ID must be an event's number, not {last_event_id!r}")
    return int(last_event_id)


async def frames(
    events: AsyncIterator[job_pb2.JobEvent], *, path: str, heartbeat_s: float
) -> AsyncGenerator[str]:
    """The stream's text. A comment is sent after each `heartbeat_s` without an event. Closes `events`."""
    yield f"retry: {_RETRY_MS}\n\n"
    async with aclosing(_with_heartbeats(events, heartbeat_s)) as beating:
        try:
            number = 0
            async for event in beating:
                if event is None:
                    yield ": still here\n\n"
                    continue
                number = event.number
                yield frame(event.WhichOneof("body") or "event", json_form(event), number=number)
            yield frame("end", {"last_event_number": number})
        except CliptuneError as error:
            yield frame("error", problem(error, path))
        except Exception as error:  # the answer has begun: the stream itself has to say it
            yield frame("error", problem(unexpected(error, path), path))


async def _with_heartbeats(
    events: AsyncIterator[job_pb2.JobEvent], heartbeat_s: float
) -> AsyncGenerator[job_pb2.JobEvent | None]:
    """The events, and None after each `heartbeat_s` without one."""
    upcoming: asyncio.Future[job_pb2.JobEvent] | None = None
    try:
        while True:
            if upcoming is None:
                upcoming = asyncio.ensure_future(anext(events))
            await asyncio.wait({upcoming}, timeout=heartbeat_s)
            if not upcoming.done():
                yield None
                continue
            arrived, upcoming = upcoming, None
            try:
                event = arrived.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.wait({upcoming})
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
