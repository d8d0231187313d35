"""Whether the daemon can do its work now, and why not.

Enters: what each part says of itself (`set`), on the event loop. Leaves: a `Report` now, or every change of
it as it happens. Asked by grpc.health.v1, by `/readyz` and by the metrics; told by `daemon.py`. Nothing here
is a constant: the engine's part follows its canary.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What has to be ready."""

    ENGINE = "engine"
    """Its canary passed."""
    MODELS = "models"
    """The models served before the last stop are loaded again, or it is known why not."""
    JOBS = "jobs"
    """Jobs have been re-read from their folders and the queue runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One part's word."""

    ready: bool
    reason: str = ""
    """Why not. Empty when ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The whole answer at one moment."""

    parts: tuple[tuple[Part, Condition], ...]
    stopping: bool

    @property
    def ready(self) -> bool:
        """Every part is, and the daemon is not stopping."""
        return not self.stopping and all(condition.ready for _, condition in self.parts)

    @property
    def reason(self) -> str:
        """Why not, for a person. Empty when ready."""
        if self.stopping:
            return "the daemon is stopping"
        return "; ".join(f"{part}: {said.reason}" for part, said in self.parts if not said.ready)

    def of(self, *parts: Part) -> bool:
        """Whether these parts are ready and the daemon is not stopping."""
        return not self.stopping and all(said.ready for part, said in self.parts if part in parts)


class Readiness:
    """The truth about readiness. Used on the event loop only."""

    def __init__(self) -> None:
        self._parts = {part: Condition(ready=False, reason="starting") for part in Part}
        self._stopping = False
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Every part is ready and the daemon is not stopping."""
        return self.report().ready

    @property
    def reason(self) -> str:
        """Why not. Empty when ready."""
        return self.report().reason

    def report(self) -> Report:
        """As of now."""
        return Report(parts=tuple(self._parts.items()), stopping=self._stopping)

    def set(self, part: Part, *, ready: bool, reason: str = "") -> None:
        """A part's word; whoever watches hears of it when it is news."""
        condition = Condition(ready=ready, reason="" if ready else reason or "not ready")
        if self._parts[part] != condition:
            self._parts[part] = condition
            self._announce()

    def stop(self) -> None:
        """Not ready any more, for good: watches end after saying so."""
        if not self._stopping:
            self._stopping = True
            self._announce()

    async def watch(self) -> AsyncIterator[Report]:
        """The report now and after each change; ends after the one that says the daemon is stopping."""
        told: Report | None = None
        while True:
            changed, report = self._changed, self.report()
            if report != told:
                told = report
                yield report
            if report.stopping:
                return
            if changed is self._changed:
                await changed.wait()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
