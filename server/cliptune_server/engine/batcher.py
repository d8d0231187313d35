"""The dynamic batcher of one device.

Enters: decoded items of many callers, each in the lane of its model and tower. Leaves: one embedding, or one
error, for each. Fed by `inference.py` on the event loop; forwards run on one thread, the only one that
touches the device. Which items of a lane go together is `lane.py`'s.

- Work-conserving: an idle device takes what is there at once; a busy one leaves with whatever has waited
  meanwhile, up to a size that takes about `budget_s`. Nothing ever waits for company.
- A batch that cannot grow any more, since more than its size waits, is prepared while another one runs. It is
  not run first for that: an interactive item that comes meanwhile goes before a prepared batch of bulk.
- The lane whose first item goes first goes next.
- An item fails alone: a forward that raises is halved until the items that it fails on are alone, and a row
  with NaN or infinity is that item's error.
- An item whose caller has gone, or whose deadline is over or cannot be kept, is dropped before the forward.

Shape suffixes: N items, D embedding.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from cliptune.errors import CliptuneError, InternalError, InvalidInputError, OverloadedError, UnavailableError
from cliptune_server.engine.lane import (
    Batch,
    Forward,
    Item,
    Lane,
    Prepare,
    Vector,
    by_place,
    positions_of,
)
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.spans import Caller, trace_batch

__all__ = ["Batcher", "BatcherConfig", "Lane", "Vector"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatcherConfig:
    """Sizes of batches."""

    max_items: int = 64
    budget_s: float = 1.0
    """About how long one forward may take, so that the next caller waits no longer than that."""
    ageing_s: float = 2.0
    """What is bulk waits so much longer than what is interactive, and no longer."""

    def __post_init__(self) -> None:
        if self.max_items < 1 or self.budget_s <= 0 or self.ageing_s < 0:
            raise InvalidInputError(
                f"batcher: {self.max_items=}, {self.budget_s=} must be above 0, {self.ageing_s=} not below"
            )


class Batcher:
    """`start` it, `open` lanes, `submit` items."""

    def __init__(self, *, progress: Progress, threads: Callable[[], None], config: BatcherConfig) -> None:
        """`threads` sets the device thread up when it starts."""
        self._progress: Final = progress
        self._config: Final = config
        self._device: Final = ThreadPoolExecutor(1, thread_name_prefix="device", initializer=threads)
        self._preparer: Final = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self.lanes: Final[list[Lane]] = []
        self._work: Final = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._running = False
        self._bulk_until_s = 0.0
        self._prepared: Batch | None = None
        self._closed = False

    def start(self) -> None:
        """Begins to serve, on the running loop."""
        self._serving = asyncio.create_task(self._serve(), name="batcher")

    async def close(self) -> None:
        """Fails what still waits, and ends after the forward that runs."""
        self._closed = True
        for lane in self.lanes:
            lane.clear(UnavailableError("the engine is stopping"))
        self._drop_prepared(UnavailableError("the engine is stopping"))
        self._work.set()
        if self._serving is not None:
            await self._serving
        self._device.shutdown()
        self._preparer.shutdown()

    def open(self, model: str, tower: str, forward: Forward, prepare: Prepare = list) -> Lane:
        """A lane for one tower; `forward` takes what `prepare` makes of the payloads of a batch."""
        lane = Lane(
            model=model, tower=tower, forward=forward, prepare=prepare, ageing_s=self._config.ageing_s
        )
        self.lanes.append(lane)
        return lane

    def remove(self, lane: Lane) -> None:
        """Takes a lane out; what waits in it is failed."""
        self.lanes.remove(lane)
        unloaded = UnavailableError(f"model {lane.model} was unloaded")
        lane.clear(unloaded)
        if self._prepared is not None and self._prepared.lane is lane:
            self._drop_prepared(unloaded)

    def submit(
        self,
        lane: Lane,
        payload: Any,
        caller: Caller,
        *,
        shape: Hashable = None,
        length: int = 1,
        urgent: bool = False,
    ) -> asyncio.Future[Vector]:
        """Queues one item; the future is its [D] embedding. `urgent` goes before all that waits.

        Items of another `shape` have batches of their own; those of another `length` are padded where that
        is cheaper.
        """
        if self._closed:
            raise UnavailableError("the engine is stopping")
        answer = lane.put(payload, caller, shape=shape, length=length, urgent=urgent)
        if self._running:
            self._prepare_ahead()
        else:
            self._work.set()
        return answer

    async def on_device(self, work: Callable[[], _T], limit_s: float) -> _T:
        """Runs something else on the device's thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._device, self._timed, work, limit_s)

    def batch_items(self, lane: Lane) -> int:
        """Items of a batch of this lane, at most."""
        return lane.cost.batch_items(self._config.budget_s, self._config.max_items)

    def queue_s(self, lane: Lane, items: int) -> float:
        """About how long the forwards of so many of its items take."""
        return lane.cost.queue_seconds(items, self.batch_items(lane))

    def bulk_left_s(self) -> float:
        """About how much longer the forward that runs takes, if it is one of bulk."""
        return max(0.0, self._bulk_until_s - time.monotonic()) if self._running else 0.0

    async def _serve(self) -> None:
        while not self._closed:
            batch = self._next()
            if batch is None:
                self._work.clear()
                if not self._closed:
                    await self._work.wait()
                continue
            self._running, batch.lane.running = True, len(batch.items)
            self._bulk_until_s = batch.bulk_until_s()
            try:
                self._prepare_ahead()
                await self._answer(batch)
            except Exception:  # a bug of ours must not end the loop that everyone waits for
                _log.exception("a batch failed")
                _fail_all(batch.items, InternalError("the batch failed; see the engine's log"))
            finally:
                self._running, batch.lane.running = False, 0

    def _next(self) -> Batch | None:
        while True:
            lane, prepared = by_place(self.lanes), self._prepared
            if prepared is not None and (lane is None or prepared.place <= (lane.place or 0)):
                self._prepared = None
                return prepared
            if lane is None:
                return None
            place = lane.place or 0
            items = self._take(lane)
            if items:
                return Batch(lane=lane, items=items, place=place)

    def _take(self, lane: Lane) -> list[Item]:
        alone = self._prepared is None and not any(len(other) for other in self.lanes if other is not lane)
        return lane.take(
            budget_s=self._config.budget_s, max_items=self._config.max_items, alone=alone and len(lane) == 1
        )

    def _prepare_ahead(self) -> None:
        """Makes the next batch ready, if more than a batch waits where it comes from."""
        lane = by_place(self.lanes) if self._prepared is None else None
        if lane is None or not lane.is_full(budget_s=self._config.budget_s, max_items=self._config.max_items):
            return
        place = lane.place or 0
        items = self._take(lane)
        if items:
            payloads = [item.payload for item in items]
            limit_s = lane.cost.stall_limit_s(positions_of(items))
            ready = asyncio.get_running_loop().run_in_executor(
                self._preparer, self._timed, lambda: lane.prepare(payloads), limit_s
            )
            self._prepared = Batch(lane=lane, items=items, place=place, ready=ready)

    def _drop_prepared(self, error: CliptuneError) -> None:
        if self._prepared is not None:
            _fail_all(self._prepared.items, error)
            if self._prepared.ready is not None:
                self._prepared.ready.add_done_callback(_look_at)
            self._prepared = None

    async def _answer(self, batch: Batch) -> None:
        """Answers every item of a batch, in halves where its forward raises."""
        lane, ready = batch.lane, batch.ready
        parts = [batch.items]
        while parts:
            given = parts.pop()
            part = _living(lane, given)
            if ready is not None and len(part) < len(given):
                ready.add_done_callback(_look_at)
                ready = None
            if not part:
                continue
            began_ns, began_s = time.time_ns(), time.perf_counter()
            try:
                rows_ND = await self._forward(lane, part, ready)
            except Exception as error:
                ready = None
                if isinstance(error, OverloadedError):
                    lane.cost.limit(len(part) // 2)
                if len(part) == 1:
                    part[0].fail(_alone(error))
                else:
                    _log.warning("a forward of %d items failed and is halved: %s", len(part), error)
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]
                continue
            seconds = time.perf_counter() - began_s
            lane.ran(part, seconds)
            trace_batch(lane.model, lane.tower, [(item.caller, item.queued_ns) for item in part], began_ns)
            for item, row_D in zip(part, rows_ND, strict=True):
                item.caller.timings.batched((began_ns - item.queued_ns) / 1e9, seconds, len(part))
                if not np.isfinite(row_D).all():
                    item.fail(InternalError(f"model {lane.model} answered with NaN or infinity"))
                elif not item.answer.done():
                    item.answer.set_result(row_D)

    async def _forward(self, lane: Lane, part: Sequence[Item], ready: asyncio.Future[Any] | None) -> Vector:
        payloads = [item.payload for item in part]
        prepared = None if ready is None else (await ready,)

        def work() -> Vector:
            return lane.forward(lane.prepare(payloads) if prepared is None else prepared[0])

        rows_ND = await self.on_device(work, lane.cost.stall_limit_s(positions_of(part)))
        if rows_ND.ndim != 2 or len(rows_ND) != len(part):
            raise InternalError(f"a forward of {len(part)} items answered with shape {rows_ND.shape}")
        return rows_ND

    def _timed(self, work: Callable[[], _T], limit_s: float) -> _T:
        with self._progress.working(limit_s):
            return work()


def _living(lane: Lane, items: Sequence[Item]) -> list[Item]:
    """Without those whose caller has gone or has no time left."""
    living: list[Item] = []
    for item in items:
        if item.answer.done():
            continue
        if item.caller.late():
            lane.expire(item, "the deadline was over before the forward")
        else:
            living.append(item)
    return living


def _fail_all(items: Sequence[Item], error: CliptuneError) -> None:
    for item in items:
        item.fail(error)


def _look_at(ready: asyncio.Future[Any]) -> None:
    """A result that nobody takes: its error is nobody's either."""
    if not ready.cancelled():
        ready.exception()


def _alone(error: Exception) -> CliptuneError:
    """What an item is told whose forward raises even alone."""
    if isinstance(error, CliptuneError):
        return error
    _log.error("a forward of one item failed", exc_info=error)
    return InternalError(f"the model failed on this item: {type(error).__name__}: {error}")
