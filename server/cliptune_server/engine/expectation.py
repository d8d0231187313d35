"""How long an answer will take, by all that was asked for before it and by the whole way that it goes.

Enters: the items of a request, each with the stage that decodes it and the lane that forwards it. Leaves:
seconds. Asked by `embedding.py` before anything is decoded; what comes of it is `admission.py`'s.

Decoding and forwards are a pipeline: while one batch runs, the next is decoded. The queue of the slower stage
decides; the other adds what one item or one batch takes in it. The lanes share one device, so their forwards
add up. What has not been measured yet costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cliptune_server.engine.backlog import Backlog, Stage
from cliptune_server.engine.batcher import Batcher
from cliptune_server.engine.lane import Lane


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Items of a request that go one way."""

    items: int
    stage: Stage
    lane: Lane


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Of one request.

    Attributes:
        own_s: until its answer, if nothing else were here.
        wait_s: what the others add.
    """

    own_s: float
    wait_s: float


class Expectation:
    """Over one device and the stages in front of it."""

    def __init__(self, batcher: Batcher, stages: Sequence[Stage]) -> None:
        self._batcher: Final = batcher
        self._stages: Final = tuple(stages)

    def of(self, parts: Sequence[Part], *, bulk: bool) -> Expected:
        """Of a request that comes now and consists of these."""
        own_s = self._seconds(parts, lambda backlog: 0)
        all_s = self._seconds(parts, lambda backlog: backlog.before(bulk=bulk))
        if not bulk:
            all_s += self._batcher.bulk_left_s()
        return Expected(own_s=own_s, wait_s=max(0.0, all_s - own_s))

    def backlog_s(self) -> float:
        """Until all that is here is answered."""
        decoding_s = [stage.backlog.before(bulk=True) * stage.item_s for stage in self._stages]
        return max([self._forwards((), lambda backlog: backlog.before(bulk=True)), *decoding_s])

    def _seconds(self, parts: Sequence[Part], before: Callable[[Backlog], int]) -> float:
        forwards_s = self._forwards(parts, before)
        latest_s = 0.0
        for part in parts:
            decoded_s = (before(part.stage.backlog) + part.items) * part.stage.item_s
            last = min(self._batcher.batch_items(part.lane), before(part.lane.backlog) + part.items)
            last_s = self._batcher.queue_s(part.lane, last)
            latest_s = max(latest_s, decoded_s + last_s, part.stage.alone_s + forwards_s)
        return latest_s

    def _forwards(self, parts: Sequence[Part], before: Callable[[Backlog], int]) -> float:
        own = {id(part.lane): part.items for part in parts}
        return sum(
            self._batcher.queue_s(lane, before(lane.backlog) + own.get(id(lane), 0))
            for lane in self._batcher.lanes
        )
