"""The dynamic batcher of one device.

Enters: decoded items of many callers, each in the lane of its model and tower. Leaves: one embedding, or one
error, for each. Fed by `inference.py` on the event loop; forwards run on one thread, the only one that
touches the device.

- Work-conserving: an idle device takes what is there at once; a busy one leaves with whatever has waited
  meanwhile, up to a size that takes about `budget_s`. Nothing ever waits for company.
- The lane whose first item has waited longest goes next.
- An item fails alone: a forward that raises is halved until the items that it fails on are alone, and a row
  with NaN or infinity is that item's error.
- An item whose caller has gone, or whose deadline is over, is dropped before the forward.

Shape suffixes: N items, D embedding.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from cliptune.errors import (
    CliptuneError,
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from cliptune_server.engine.cost import Cost
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.spans import Caller, trace_batch

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
Vector = npt.NDArray[np.float32]
# Payloads of one lane → [N, D] float32. Runs on the device's thread.
Forward = Callable[[Sequence[Any]], Vector]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatcherConfig:
    """Sizes of batches."""

    max_items: int = 64
    budget_s: float = 1.0
    """About how long one forward may take, so that the next caller waits no longer than that."""

    def __post_init__(self) -> None:
        if self.max_items < 1 or self.budget_s <= 0:
            raise InvalidInputError(f"batcher: {self.max_items=} and {self.budget_s=} must be positive")


@dataclass(eq=False, kw_only=True, slots=True)
class Item:
    """One image or text that waits for its forward."""

    payload: Any
    caller: Caller
    answer: asyncio.Future[Vector]
    queued_ns: int
    urgent: bool

    @property
    def place(self) -> int:
        """Smaller goes first."""
        return 0 if self.urgent else self.queued_ns

    def fail(self, error: CliptuneError) -> None:
        """Answers with an error, unless the caller has gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False, kw_only=True, slots=True)
class Lane:
    """The queue of one tower of one model, and what has gone through it."""

    model: str
    tower: str
    forward: Forward
    waiting: deque[Item] = field(default_factory=deque)
    running: int = 0
    cost: Cost = field(default_factory=Cost)
    batches: int = 0
    items: int = 0
    forward_s: float = 0.0


class Batcher:
    """`start` it, `open` lanes, `submit` items."""

    def __init__(self, *, progress: Progress, threads: Callable[[], None], config: BatcherConfig) -> None:
        """`threads` sets the device thread up when it starts."""
        self._progress: Final = progress
        self._config: Final = config
        self._device: Final = ThreadPoolExecutor(1, thread_name_prefix="device", initializer=threads)
        self.lanes: Final[list[Lane]] = []
        self._work: Final = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begins to serve, on the running loop."""
        self._serving = asyncio.create_task(self._serve(), name="batcher")

    async def close(self) -> None:
        """Fails what still waits, and ends after the forward that runs."""
        self._closed = True
        for lane in self.lanes:
            _fail_all(lane.waiting, UnavailableError("the engine is stopping"))
            lane.waiting.clear()
        self._work.set()
        if self._serving is not None:
            await self._serving
        self._device.shutdown()

    def open(self, model: str, tower: str, forward: Forward) -> Lane:
        """A lane for one tower."""
        lane = Lane(model=model, tower=tower, forward=forward)
        self.lanes.append(lane)
        return lane

    def remove(self, lane: Lane) -> None:
        """Takes a lane out; what waits in it is failed."""
        self.lanes.remove(lane)
        _fail_all(lane.waiting, UnavailableError(f"model {lane.model} was unloaded"))
        lane.waiting.clear()

    def submit(
        self, lane: Lane, payload: Any, caller: Caller, *, urgent: bool = False
    ) -> asyncio.Future[Vector]:
        """Queues one item; the future is its [D] embedding. `urgent` goes before all that waits."""
        if self._closed:
            raise UnavailableError("the engine is stopping")
        answer: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        item = Item(payload=payload, caller=caller, answer=answer, queued_ns=time.time_ns(), urgent=urgent)
        if urgent:
            lane.waiting.appendleft(item)
        else:
            lane.waiting.append(item)
        self._work.set()
        return answer

    async def on_device(self, work: Callable[[], _T], limit_s: float) -> _T:
        """Runs something else on the device's thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._device, self._timed, work, limit_s)

    def backlog_s(self) -> float:
        """About how long what waits now will take."""
        return sum((len(lane.waiting) + lane.running) * (lane.cost.item_s or 0.0) for lane in self.lanes)

    async def _serve(self) -> None:
        while not self._closed:
            lane = min(
                (lane for lane in self.lanes if lane.waiting),
                key=lambda lane: lane.waiting[0].place,
                default=None,
            )
            if lane is None:
                self._work.clear()
                await self._work.wait()
                continue
            size = lane.cost.batch_items(self._config.budget_s, self._config.max_items)
            batch: list[Item] = []
            while lane.waiting and len(batch) < size:
                batch += _living([lane.waiting.popleft()])
            lane.running = len(batch)
            try:
                await self._answer(lane, batch)
            except Exception:  # a bug of ours must not end the loop that everyone waits for
                _log.exception("a batch failed")
                _fail_all(batch, InternalError("the batch failed; see the engine's log"))
            finally:
                lane.running = 0

    async def _answer(self, lane: Lane, batch: Sequence[Item]) -> None:
        """Answers every item of a batch, in halves where its forward raises."""
        parts = [list(batch)]
        while parts:
            part = _living(parts.pop())
            if not part:
                continue
            began_ns, began_s = time.time_ns(), time.perf_counter()
            try:
                rows_ND = await self._forward(lane, part)
            except Exception as error:
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
            lane.cost.record(len(part), seconds)
            lane.batches += 1
            lane.items += len(part)
            lane.forward_s += seconds
            trace_batch(lane.model, lane.tower, [(item.caller, item.queued_ns) for item in part], began_ns)
            for item, row_D in zip(part, rows_ND, strict=True):
                if not np.isfinite(row_D).all():
                    item.fail(InternalError(f"model {lane.model} answered with NaN or infinity"))
                elif not item.answer.done():
                    item.answer.set_result(row_D)

    async def _forward(self, lane: Lane, part: Sequence[Item]) -> Vector:
        payloads = [item.payload for item in part]
        limit_s = lane.cost.stall_limit_s(len(part))
        rows_ND = await self.on_device(lambda: lane.forward(payloads), limit_s)
        if rows_ND.ndim != 2 or len(rows_ND) != len(part):
            raise InternalError(f"a forward of {len(part)} items answered with shape {rows_ND.shape}")
        return rows_ND

    def _timed(self, work: Callable[[], _T], limit_s: float) -> _T:
        with self._progress.working(limit_s):
            return work()


def _living(items: Iterable[Item]) -> list[Item]:
    """Without those whose caller has gone or has no time left."""
    living: list[Item] = []
    for item in items:
        if item.answer.done():
            continue
        if item.caller.late():
            item.fail(DeadlineExceededError("the deadline was over before the forward"))
        else:
            living.append(item)
    return living


def _fail_all(items: Iterable[Item], error: CliptuneError) -> None:
    for item in items:
        item.fail(error)


def _alone(error: Exception) -> CliptuneError:
    """What an item is told whose forward raises even alone."""
    if isinstance(error, CliptuneError):
        return error
    _log.error("a forward of one item failed", exc_info=error)
    return InternalError(f"the model failed on this item: {type(error).__name__}: {error}")
