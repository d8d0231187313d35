"""A job's public log: events numbered from 1 without a gap, in `events.jsonl`, and any number of watchers.

Enters: `Entry` objects. Leaves: the same with their numbers, on disk before anybody sees them; to each
watcher every event after the number it names, once, in order. Called by `live_job.py` (append) and
`jobs.py` (watch).

A line is {"number": 7, "sequence": 3, "event": {…}}; `sequence` (or `early_sequence`) names the trainer's
line it came from, so that duplicates are known after a restart too. A watcher holds no queue: at the end of
the log it is served from the newest events in memory, behind that it reads the file at its own pace.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format

from cliptune.durable import is_disk_full
from cliptune.errors import UnavailableError
from cliptune.v1 import job_pb2
from cliptune_server.training.job import Entry, is_final

log = logging.getLogger(__name__)

_KEPT_IN_MEMORY: Final = 256
_READ_AT_ONCE: Final = 256
# Only the newest of these counts for the state of a job.
_SUPERSEDED: Final = ("progress", "log", "checkpoint")


class CorruptLogError(Exception):
    """A line in the middle of a log cannot be read."""


class EventLog:
    """The open log of a job that has not ended. One per job and process."""

    def __init__(self, path: Path, threads: Executor, *, last_number: int, size_bytes: int) -> None:
        self._path = path
        self._threads = threads
        self.last_number = last_number
        self._saved_bytes = size_bytes
        self._saved_number = last_number
        self._unsaved: list[bytes] = []
        self._newest: deque[job_pb2.JobEvent] = deque()
        self._grown = asyncio.Event()
        self._ended = False
        self._closed: UnavailableError | None = None
        self._appending = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path, threads: Executor) -> tuple[EventLog, list[Entry]]:
        """Opens or makes the log, mends a torn end; gives the entries that the state follows from.

        `CorruptLogError` when a line before the last is damaged.
        """
        loop = asyncio.get_running_loop()
        entries, last_number, size_bytes = await loop.run_in_executor(threads, _recover, path)
        opened = cls(path, threads, last_number=last_number, size_bytes=size_bytes)
        opened._ended = bool(entries) and is_final(entries[-1].event)
        return opened, entries

    async def append(self, entries: Sequence[Entry]) -> None:
        """Numbers the events (in place), writes them, then shows them to the watchers.

        On a full disk they are kept in memory and written by a later call: the events of a job that pauses
        for that reason must still reach its watchers. Must not be cancelled half-way: callers shield it.
        """
        async with self._appending:
            for entry in entries:
                self.last_number += 1
                entry.event.number = self.last_number
                self._unsaved.append(_line(entry))
            try:
                await asyncio.get_running_loop().run_in_executor(self._threads, self._save)
            except OSError:
                self.last_number -= len(entries)
                del self._unsaved[-len(entries) :]
                raise
            self._newest.extend(entry.event for entry in entries)
            while len(self._newest) > _KEPT_IN_MEMORY and self._newest[0].number <= self._saved_number:
                self._newest.popleft()
            self._ended = self._ended or any(is_final(entry.event) for entry in entries)
            self._wake()

    async def follow(self, after_number: int) -> AsyncGenerator[job_pb2.JobEvent]:
        """Events with a greater number, live, to the final one. `UnavailableError` once the log closes."""
        offset = 0
        while True:
            if self._newest and after_number + 1 >= self._newest[0].number:
                skipped = after_number + 1 - self._newest[0].number
                batch = [self._newest[index] for index in range(skipped, len(self._newest))]
            elif after_number < self._saved_number:
                batch, offset = await self._read(offset, after_number)
            else:
                batch = []
            for event in batch:
                yield event
                after_number = event.number
                if is_final(event):
                    return
            if after_number < self.last_shown:
                continue
            if self._ended:
                return
            if self._closed is not None:
                raise UnavailableError(self._closed.message)
            await self._grown.wait()

    @property
    def last_shown(self) -> int:
        """Number of the newest event that watchers may see."""
        return self._newest[-1].number if self._newest else self._saved_number

    def close(self, reason: UnavailableError) -> None:
        """Ends every watch with `reason` once it has everything."""
        self._closed = reason
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def _read(self, offset: int, after_number: int) -> tuple[list[job_pb2.JobEvent], int]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, _read_events, self._path, offset, self._saved_bytes, after_number
        )

    def _save(self) -> None:
        try:
            with self._path.open("r+b" if self._path.exists() else "w+b") as file:
                file.seek(self._saved_bytes)
                file.write(b"".join(self._unsaved))
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
                self._saved_bytes = file.tell()
        except OSError as error:
            if not is_disk_full(error):
                raise
            log.warning("%s: %d events wait for room on the disk", self._path, len(self._unsaved))
            return
        self._unsaved.clear()
        self._saved_number = self.last_number


async def replay(path: Path, threads: Executor, after_number: int) -> AsyncGenerator[job_pb2.JobEvent]:
    """The events of an ended job after a number, from its file."""
    loop = asyncio.get_running_loop()
    offset, size_bytes = 0, await loop.run_in_executor(threads, os.path.getsize, path)
    while True:
        batch, offset = await loop.run_in_executor(
            threads, _read_events, path, offset, size_bytes, after_number
        )
        if not batch:
            return
        for event in batch:
            yield event
            after_number = event.number
            if is_final(event):
                return


def _line(entry: Entry) -> bytes:
    content: dict[str, Any] = {"number": entry.event.number}
    if entry.sequence:
        content["early_sequence" if entry.early else "sequence"] = entry.sequence
    content["event"] = json_format.MessageToDict(entry.event, preserving_proto_field_name=True)
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _entry(content: dict[str, Any]) -> Entry:
    event = json_format.ParseDict(content["event"], job_pb2.JobEvent(), ignore_unknown_fields=True)
    early = content.get("early_sequence", 0)
    return Entry(event=event, sequence=content.get("sequence", early), early=bool(early))


def _read_events(
    path: Path, offset: int, size_bytes: int, after_number: int
) -> tuple[list[job_pb2.JobEvent], int]:
    """Up to `_READ_AT_ONCE` events after a number, and the offset behind the last of them."""
    events: list[job_pb2.JobEvent] = []
    with path.open("rb") as file:
        file.seek(offset)
        while offset < size_bytes and len(events) < _READ_AT_ONCE:
            line = file.readline()
            offset += len(line)
            # {"number":7,… : the number alone is cheap to see.
            if int(line[10 : line.index(b",")]) > after_number:
                events.append(_entry(json.loads(line)).event)
    return events, offset


def _recover(path: Path) -> tuple[list[Entry], int, int]:
    """Entries that matter for the state, the last number, and the size after a torn end was cut off."""
    if not path.exists():
        return [], 0, 0
    kept: list[tuple[int, dict[str, Any]]] = []
    newest: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
    number = size_bytes = 0
    for line in _whole_lines(path):
        content = _parse(line, number + 1)
        if content is None:
            if size_bytes + len(line) < path.stat().st_size:
                raise CorruptLogError(f"{path}: the line after event {number} cannot be read")
            break
        number += 1
        size_bytes += len(line)
        kind = next((name for name in _SUPERSEDED if name in content["event"]), None)
        if kind is None:
            kept.append((number, content))
        else:
            newest[kind, content["event"].get("attempt", 0)] = (number, content)
    if size_bytes < path.stat().st_size:
        log.warning("%s: a torn line at the end is cut off", path)
        os.truncate(path, size_bytes)
    kept.extend(newest.values())
    kept.sort(key=lambda pair: pair[0])
    return [_entry(content) for _, content in kept], number, size_bytes


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _parse(line: bytes, expected_number: int) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(line)
        return content if content["number"] == expected_number and "event" in content else None
    except (ValueError, KeyError, TypeError):
        return None
