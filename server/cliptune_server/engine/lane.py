"""What waits for one tower of one model, and which of it makes the next batch.

Enters: items. Leaves: batches of items that one forward takes together. Held by `batcher.py`, which chooses
between lanes; used on the event loop only.

- In order of arrival, the interactive before the bulk; but where bulk has waited `ageing_s` longer, and had
  no turn for so long, it leads the next batch. So it waits long at worst, and never for ever; and however
  much of it waits, what is interactive waits for one batch of it.
- Items of different `shape` never share a forward. Items of different `length` (texts) do where the padding
  costs less than a forward more, by what forwards were measured to cost.
- No batch is so large that it would end after the deadline of one in it. What cannot be answered in time even
  by itself is told so now, unless nothing else waits: a cost that was measured too high is measured again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cliptune.errors import CliptuneError, DeadlineExceededError
from cliptune_server.engine.backlog import Backlog
from cliptune_server.engine.cost import Cost
from cliptune_server.engine.spans import Caller

Vector = npt.NDArray[np.float32]
# What a lane's batch is made into → [N, D] float32. Runs on the device's thread.
Forward = Callable[[Any], Vector]
# Payloads of a batch → what the forward takes. Runs beside the device, on a thread of its own.
Prepare = Callable[[Sequence[Any]], Any]

# Items that are looked at for one batch, as a multiple of the largest batch: a bound on the time it takes.
_LOOK_AHEAD: Final = 4
BATCH_SIZES: Final = tuple(2**power for power in range(11))


@dataclass(eq=False, kw_only=True, slots=True)
class Item:
    """One image or text that waits for its forward."""

    payload: Any
    caller: Caller
    answer: asyncio.Future[Vector]
    queued_ns: int
    place: int
    """Smaller goes first."""
    shape: Hashable = None
    length: int = 1
    """Positions that it takes in a forward."""

    def fail(self, error: CliptuneError) -> None:
        """Answers with an error, unless the caller has gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False, kw_only=True, slots=True)
class Batch:
    """Items that go together."""

    lane: Lane
    items: list[Item]
    place: int
    """Its lane's, when it was taken."""
    ready: asyncio.Future[Any] | None = None
    """What its forward takes, where that is prepared ahead."""

    def bulk_until_s(self) -> float:
        """When its forward will end if it begins now, by time.monotonic; 0 if it is not led by bulk."""
        if not self.items[0].caller.bulk:
            return 0.0
        return time.monotonic() + self.lane.cost.seconds(positions_of(self.items))


def positions_of(items: Sequence[Item]) -> int:
    """What a forward of these computes, padding included."""
    return len(items) * max((item.length for item in items), default=0)


@dataclass(eq=False, kw_only=True, slots=True)
class Lane:
    """The queue of one tower of one model, and what has gone through it."""

    model: str
    tower: str
    forward: Forward
    prepare: Prepare = list
    ageing_s: float = 2.0
    cost: Cost = field(default_factory=Cost)
    running: int = 0
    backlog: Backlog = field(default_factory=Backlog)
    """Items of requests that are being answered: also those not decoded yet."""
    batches: int = 0
    items: int = 0
    positions: int = 0
    padding: int = 0
    expired: int = 0
    forward_s: float = 0.0
    sizes: list[int] = field(default_factory=lambda: [0] * len(BATCH_SIZES))
    _interactive: deque[Item] = field(default_factory=deque)
    _bulk: deque[Item] = field(default_factory=deque)
    _bulk_turn_ns: int = 0

    def __len__(self) -> int:
        return len(self._interactive) + len(self._bulk)

    @property
    def place(self) -> int | None:
        """Of the item that goes first; None when none waits."""
        if self._interactive:
            first = self._interactive[0].place
            return min(first, self._bulk_place) if self._bulk else first
        return self._bulk_place if self._bulk else None

    @property
    def _bulk_place(self) -> int:
        """Of the first that is bulk: not before its ageing, nor before that of its last turn."""
        return max(self._bulk[0].place, self._bulk_turn_ns + round(self.ageing_s * 1e9))

    @property
    def oldest_s(self) -> float:
        """Age of the item that has waited longest."""
        first_ns = min(
            (queue[0].queued_ns for queue in (self._interactive, self._bulk) if queue), default=None
        )
        return 0.0 if first_ns is None else max(0.0, (time.time_ns() - first_ns) / 1e9)

    def put(
        self,
        payload: Any,
        caller: Caller,
        *,
        shape: Hashable = None,
        length: int = 1,
        urgent: bool = False,
    ) -> asyncio.Future[Vector]:
        """Queues one item; `urgent` goes before all that waits."""
        now_ns = time.time_ns()
        place = 0 if urgent else now_ns + (round(self.ageing_s * 1e9) if caller.bulk else 0)
        answer: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        item = Item(
            payload=payload,
            caller=caller,
            answer=answer,
            queued_ns=now_ns,
            place=place,
            shape=shape,
            length=length,
        )
        if urgent:
            self._interactive.appendleft(item)
        else:
            (self._bulk if caller.bulk else self._interactive).append(item)
        return answer

    def take(self, *, budget_s: float, max_items: int, alone: bool) -> list[Item]:
        """The next batch; empty when nobody waits any more. `alone`: nothing waits in any other lane."""
        limit = self.cost.batch_items(budget_s, max_items)
        seen = self._living(self._pull(_LOOK_AHEAD * max_items), keep_lone=alone)
        if not seen:
            return []
        lengths = self._lengths(seen)
        most = max(self.cost.batch_positions(budget_s), seen[0].length)
        taken: list[Item] = []
        left: list[Item] = []
        longest, until_s = 0, float("inf")
        for item in seen:
            new_longest = max(longest, item.length)
            new_until_s = min(until_s, item.caller.deadline_s or float("inf"))
            positions = (len(taken) + 1) * new_longest
            fits = (
                len(taken) < limit
                and item.shape == seen[0].shape
                and item.length in lengths
                and positions <= most
                and time.monotonic() + self.cost.seconds(positions) <= new_until_s
            )
            if fits or not taken:
                taken.append(item)
                longest, until_s = new_longest, new_until_s
            else:
                left.append(item)
        self._put_back(left)
        if taken[0].caller.bulk or 2 * sum(item.caller.bulk for item in taken) >= len(taken):
            self._bulk_turn_ns = time.time_ns()
        return taken

    def is_full(self, *, budget_s: float, max_items: int) -> bool:
        """Whether more than a whole batch waits, so that none can grow by waiting."""
        return len(self) >= self.cost.batch_items(budget_s, max_items)

    def clear(self, error: CliptuneError) -> None:
        """Fails all that waits."""
        for queue in (self._interactive, self._bulk):
            for item in queue:
                item.fail(error)
            queue.clear()

    def ran(self, items: Sequence[Item], seconds: float) -> None:
        """A forward of these has ended."""
        positions = positions_of(items)
        self.cost.record(len(items), seconds, positions)
        self.batches += 1
        self.items += len(items)
        self.positions += positions
        self.padding += positions - sum(item.length for item in items)
        self.forward_s += seconds
        self.sizes[min(len(self.sizes) - 1, (len(items) - 1).bit_length())] += 1

    def _pull(self, count: int) -> list[Item]:
        found: list[Item] = []
        first, second = self._interactive, self._bulk
        turn = bool(second) and (not first or self._bulk_place < first[0].place)
        while len(found) < count and len(self):
            ahead = first and not (turn and second and second[0].place < first[0].place)
            found.append((first if ahead else second).popleft())
        return found

    def _put_back(self, items: Iterable[Item]) -> None:
        for item in reversed(list(items)):
            (self._bulk if item.caller.bulk and item.place else self._interactive).appendleft(item)

    def _living(self, items: Sequence[Item], *, keep_lone: bool) -> list[Item]:
        """Without those whose caller has gone, or whose time is over or too short."""
        living: list[Item] = []
        for item in items:
            if item.answer.done():
                continue
            deadline_s, now_s = item.caller.deadline_s, time.monotonic()
            if deadline_s is None or now_s + self.cost.seconds(item.length) <= deadline_s:
                living.append(item)
            elif now_s >= deadline_s:
                self.expire(item, "the deadline was over before the forward")
            elif keep_lone and len(items) == 1:
                living.append(item)
            else:
                self.expire(item, "the deadline would have been over before the forward's end")
        return living

    def expire(self, item: Item, why: str) -> None:
        """It is not answered in time."""
        self.expired += 1
        item.fail(DeadlineExceededError(why))

    def _lengths(self, seen: Sequence[Item]) -> set[int]:
        """Lengths that go with the first item's: the padding costs less than a forward of their own."""
        counts = Counter(item.length for item in seen if item.shape == seen[0].shape)
        chosen = {seen[0].length}

        def padding(lengths: set[int]) -> int:
            longest = max(lengths)
            return sum(counts[length] * (longest - length) for length in lengths)

        for length in sorted(counts.keys() - chosen, key=lambda one: abs(one - seen[0].length)):
            together = chosen | {length}
            if self.cost.worth_padding(padding(together) - padding(chosen)):
                chosen = together
        return chosen


def by_place(lanes: Iterable[Lane]) -> Lane | None:
    """The lane whose first item goes next; None when nothing waits."""
    waiting = [
        (place, number, lane) for number, lane in enumerate(lanes) if (place := lane.place) is not None
    ]
    return min(waiting)[2] if waiting else None
