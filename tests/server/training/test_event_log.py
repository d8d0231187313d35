"""The public log of a job: numbers without a gap, on disk before they are seen, mended after a crash."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cliptune.errors import UnavailableError
from cliptune.v1 import job_pb2
from cliptune_server.training.event_log import CorruptLogError, EventLog, replay
from cliptune_server.training.job import Entry


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def entries(count: int, *, first_step: int = 1, attempt: int = 1) -> list[Entry]:
    steps = range(first_step, first_step + count)
    return [
        Entry(event=job_pb2.JobEvent(attempt=attempt, progress=job_pb2.Progress(step=step)), sequence=step)
        for step in steps
    ]


def final() -> Entry:
    change = job_pb2.StateChange(state=job_pb2.JOB_STATE_SUCCEEDED)
    return Entry(event=job_pb2.JobEvent(state=change))


async def numbers(events: AsyncIterator[job_pb2.JobEvent]) -> list[int]:
    return [event.number async for event in events]


async def test_a_log_reopened_goes_on_with_the_next_number(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    path = tmp_path / "events.jsonl"
    log, found = await EventLog.open(path, threads)
    assert found == []
    await log.append(entries(3))
    reopened, found = await EventLog.open(path, threads)
    assert reopened.last_number == 3
    assert max(entry.sequence for entry in found) == 3
    await reopened.append([final()])
    assert await numbers(reopened.follow(0)) == [1, 2, 3, 4]
    assert await numbers(replay(path, threads, 2)) == [3, 4]


@pytest.mark.parametrize("torn", [b'{"number":3,"ev', b"\0\0\0\0\n", b'{"number":9,"event":{}}\n'])
async def test_a_torn_end_is_cut_off_and_its_number_given_anew(
    torn: bytes, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    path = tmp_path / "events.jsonl"
    log, _ = await EventLog.open(path, threads)
    await log.append(entries(2))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    reopened, _ = await EventLog.open(path, threads)
    assert path.read_bytes() == whole
    await reopened.append([final()])
    assert await numbers(reopened.follow(0)) == [1, 2, 3]


async def test_damage_before_the_end_is_told(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    path = tmp_path / "events.jsonl"
    log, _ = await EventLog.open(path, threads)
    await log.append(entries(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"damaged\n" + lines[2])
    with pytest.raises(CorruptLogError, match="after event 1"):
        await EventLog.open(path, threads)


async def test_a_watcher_far_behind_reads_the_file_and_misses_nothing(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    log, _ = await EventLog.open(tmp_path / "events.jsonl", threads)
    slow = log.follow(0)
    await log.append(entries(1))
    assert (await anext(slow)).number == 1
    for start in range(2, 1002, 100):
        await log.append(entries(100, first_step=start))
    await log.append([final()])
    assert await numbers(slow) == list(range(2, 1003))


async def test_a_watcher_waits_for_events_and_ends_after_the_final_state(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    log, _ = await EventLog.open(tmp_path / "events.jsonl", threads)
    watchers = [asyncio.create_task(numbers(log.follow(after))) for after in (0, 1, 2)]
    await log.append(entries(2))
    await log.append([final()])
    assert await asyncio.gather(*watchers) == [[1, 2, 3], [2, 3], [3]]


async def test_a_closed_log_gives_everything_and_then_tells_why_it_ends(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    log, _ = await EventLog.open(tmp_path / "events.jsonl", threads)
    await log.append(entries(2))
    log.close(UnavailableError("the daemon is stopping"))
    watch = log.follow(0)
    assert [(await anext(watch)).number, (await anext(watch)).number] == [1, 2]
    with pytest.raises(UnavailableError, match="stopping"):
        await anext(watch)


async def test_on_a_full_disk_watchers_see_events_that_are_written_when_there_is_room(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    path = tmp_path / "events.jsonl"
    log, _ = await EventLog.open(path, threads)
    await log.append(entries(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        await log.append(entries(2, first_step=2))
        watch = log.follow(0)
        assert [(await anext(watch)).number for _ in range(3)] == [1, 2, 3]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await log.append([final()])
    assert await numbers(watch) == [4]
    assert await numbers(replay(path, threads, 0)) == [1, 2, 3, 4]
