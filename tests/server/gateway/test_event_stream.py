"""Job events as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from cliptune.errors import InvalidInputError, UnavailableError
from cliptune.v1 import job_pb2
from cliptune_server.gateway.events import after_number, frames


def progress(number: int, loss: float = 0.5) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(job_id="j", number=number, progress=job_pb2.Progress(step=number, loss=loss))


async def collect(events: AsyncIterator[job_pb2.JobEvent], heartbeat_s: float = 60) -> list[dict[str, str]]:
    """The fields of each frame, read as the standard says."""
    text = "".join([part async for part in frames(events, path="/v1/jobs/j/events", heartbeat_s=heartbeat_s)])
    assert text.endswith("\n\n")
    blocks = [block.split("\n") for block in text[:-2].split("\n\n")]
    return [dict(line.split(": ", 1) for line in block) for block in blocks]


async def test_each_event_has_its_number_its_kind_and_its_json() -> None:
    async def events() -> AsyncGenerator[job_pb2.JobEvent]:
        yield progress(1)
        yield job_pb2.JobEvent(
            job_id="j", number=2, log=job_pb2.LogLine(level="info", message="two\nlines\r\n\u2028and more")
        )
        yield progress(3, loss=float("nan"))

    first, *found, end = await collect(events())
    assert first == {"retry": "1000"}
    assert [(frame["id"], frame["event"]) for frame in found] == [
        ("1", "progress"),
        ("2", "log"),
        ("3", "progress"),
    ]
    assert json.loads(found[1]["data"])["log"]["message"] == "two\nlines\r\n\u2028and more"
    assert json.loads(found[2]["data"])["progress"]["loss"] is None
    assert (end["event"], json.loads(end["data"])) == ("end", {"last_event_number": 3})
    assert "id" not in end


async def test_silence_is_filled_with_comments_and_no_event_is_lost_in_them() -> None:
    go_on = asyncio.Event()

    async def events() -> AsyncGenerator[job_pb2.JobEvent]:
        await go_on.wait()
        yield progress(1)

    parts: list[str] = []
    async for part in frames(events(), path="/", heartbeat_s=0.01):
        parts.append(part)
        if parts.count(": still here\n\n") == 3:
            go_on.set()
    assert sum(part.startswith("id: 1\n") for part in parts) == 1
    assert parts[-1].startswith("event: end")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(UnavailableError("the daemon stops"), "UnavailableError"), (ValueError("x"), "InternalError")],
)
async def test_a_watch_that_breaks_off_says_why(error: Exception, reason: str) -> None:
    async def events() -> AsyncGenerator[job_pb2.JobEvent]:
        yield progress(1)
        raise error

    *_, last = await collect(events())
    assert last["event"] == "error"
    assert json.loads(last["data"])["reason"] == reason


async def test_a_reader_who_leaves_closes_the_watch() -> None:
    closed = asyncio.Event()

    async def events() -> AsyncGenerator[job_pb2.JobEvent]:
        try:
            yield progress(1)
            await asyncio.Event().wait()
        finally:
            closed.set()

    stream = frames(events(), path="/", heartbeat_s=0.01)
    async for part in stream:
        if part.startswith(":"):  # the watch waits for its next event
            break
    await stream.aclose()
    assert closed.is_set()


def test_a_reconnecting_browser_goes_on_where_it_was_whatever_the_address_says() -> None:
    assert after_number(None, 7) == 7
    assert after_number("", 7) == 7
    assert after_number("12", 7) == 12
    for wrong in ("x", "-1", "1.5", "²", "9" * 30):
        with pytest.raises(InvalidInputError, match="Last-Event-ID"):
            after_number(wrong, 0)
