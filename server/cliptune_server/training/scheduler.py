"""Who runs next: a queue a device, one running job on each; studies hold none. Pure: the order follows from
the jobs' events.

Enters: jobs that wait with their device and ticket, devices taken and given back. Leaves: which jobs to
start now. Called by `jobs.py`, which fills it again after a restart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from cliptune_server.training.job import NO_DEVICE


class _Place(NamedTuple):
    ticket_ns: int
    job_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A job in the queue."""

    job_id: str
    device: str
    ticket_ns: int
    """The lowest is next; kept by a job that crashed or was suspended, so that it keeps its place."""


class Scheduler:
    """Queue and slots of all devices."""

    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._running: dict[str, str] = {}

    def enqueue(self, waiting: Waiting) -> None:
        """Adds a job, or moves it."""
        self._waiting[waiting.job_id] = waiting

    def withdraw(self, job_id: str) -> None:
        """Takes a job out of the queue; nothing happens when it is not in it."""
        self._waiting.pop(job_id, None)

    def occupy(self, job_id: str, device: str) -> None:
        """A job runs on a device already (found after a restart)."""
        self.withdraw(job_id)
        self._running[job_id] = device

    def release(self, job_id: str) -> None:
        """The job's trainer has ended; nothing happens when it had no device."""
        self._running.pop(job_id, None)

    def start_next(self) -> list[str]:
        """Jobs whose device is free and whose turn it is; they have their device from now on."""
        taken = set(self._running.values())
        started = []
        for waiting in self._in_order():
            if waiting.device == NO_DEVICE or waiting.device not in taken:
                taken.add(waiting.device)
                self.occupy(waiting.job_id, waiting.device)
                started.append(waiting.job_id)
        return started

    def position(self, job_id: str) -> int:
        """Place in its device's queue, from 1. 0: not queued."""
        mine = self._waiting.get(job_id)
        if mine is None:
            return 0
        same = [waiting.job_id for waiting in self._in_order() if waiting.device == mine.device]
        return same.index(job_id) + 1

    def waiting_by_device(self) -> dict[str, int]:
        """Length of each queue."""
        return dict(Counter(waiting.device for waiting in self._waiting.values()))

    def running_by_device(self) -> dict[str, int]:
        """Devices in use; under "none" the studies."""
        return dict(Counter(self._running.values()))

    def _in_order(self) -> list[Waiting]:
        return sorted(self._waiting.values(), key=lambda waiting: _Place(waiting.ticket_ns, waiting.job_id))
