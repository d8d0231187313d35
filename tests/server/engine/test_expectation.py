"""How long an answer is expected to take, and what becomes of three times the load that the engine can do."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest

from cliptune.errors import OverloadedError
from cliptune_server.engine.admission import Admission, AdmissionLimits
from cliptune_server.engine.backlog import Backlog, Stage
from cliptune_server.engine.batcher import Batcher, BatcherConfig, Lane
from cliptune_server.engine.expectation import Expectation, Part
from cliptune_server.engine.progress import Progress

DEADLINE_S = 3.0


def device(item_s: float, batch_s: float = 0.0) -> tuple[Batcher, Lane]:
    """One lane whose forwards were measured to take `item_s` an item and `batch_s` a batch."""
    batcher = Batcher(progress=Progress(), threads=lambda: None, config=BatcherConfig(max_items=64))
    lane = batcher.open("m:1", "image", lambda items: np.zeros((len(items), 1), np.float32))
    for items in (2, 32, 8, 64):
        lane.cost.record(items, batch_s + item_s * items)
    return batcher, lane


def stage_of(seconds: float, threads: int = 1) -> Stage:
    stage = Stage(threads)
    stage.record(8, 8 * seconds)
    return stage


def test_of_decoding_and_forwards_the_slower_ones_queue_decides() -> None:
    for decode_s, forward_s, expected_s in ((0.10, 0.01, 4 * 0.10 + 0.04), (0.01, 0.10, 0.04 + 4 * 0.10)):
        batcher, lane = device(forward_s)
        part = Part(items=4, stage=stage_of(decode_s), lane=lane)
        expectation = Expectation(batcher, [part.stage])
        alone = expectation.of([part], bulk=False)
        assert alone.own_s == pytest.approx(expected_s)
        assert alone.wait_s == 0
        with part.stage.backlog.expecting(16, bulk=False), lane.backlog.expecting(16, bulk=False):
            found = expectation.of([part], bulk=False)
            assert found.own_s == alone.own_s
            assert found.wait_s == pytest.approx(16 * max(decode_s, forward_s), rel=0.4)
            assert expectation.backlog_s() == pytest.approx(16 * max(decode_s, forward_s))
        assert expectation.of([part], bulk=False) == alone


def test_more_threads_decode_faster_and_what_was_never_measured_costs_nothing() -> None:
    batcher, lane = device(0.001)
    slow, fast = (
        Expectation(batcher, [stage]).of([Part(items=32, stage=stage, lane=lane)], bulk=True).own_s
        for stage in (stage_of(0.1), stage_of(0.1, threads=4))
    )
    assert slow == pytest.approx(3.2 + 0.032)
    assert fast == pytest.approx(0.8 + 0.032)
    unmeasured = batcher.open("m:2", "image", lambda items: np.zeros((len(items), 1), np.float32))
    part = Part(items=32, stage=Stage(1), lane=unmeasured)
    assert Expectation(batcher, [part.stage]).of([part], bulk=False).own_s == 0


def test_models_share_one_device() -> None:
    batcher, lane = device(0.01)
    other = batcher.open("m:2", "text", lambda items: np.zeros((len(items), 1), np.float32))
    other.cost.record(10, 1.0)
    part = Part(items=1, stage=Stage(1), lane=lane)
    with other.backlog.expecting(20, bulk=False):
        assert Expectation(batcher, [part.stage]).of([part], bulk=False).wait_s == pytest.approx(2.0)


def test_what_is_interactive_does_not_wait_for_the_bulk_in_the_queues() -> None:
    batcher, lane = device(0.01)
    part = Part(items=1, stage=stage_of(0.01), lane=lane)
    expectation = Expectation(batcher, [part.stage])
    with lane.backlog.expecting(500, bulk=True), part.stage.backlog.expecting(500, bulk=True):
        assert expectation.of([part], bulk=False).wait_s == 0
        assert expectation.of([part], bulk=True).wait_s == pytest.approx(5.0, rel=0.2)


def test_a_backlog_shrinks_item_by_item_and_is_given_back_by_whoever_leaves() -> None:
    backlog = Backlog()
    with backlog.expecting(5, bulk=False) as done:
        done()
        done()
        assert (backlog.before(bulk=False), backlog.before(bulk=True)) == (3, 3)
    done()  # one that ends after its request
    assert backlog.before(bulk=True) == 0


class Pipeline:
    """A decoder and a device in simulated time, over the real counts and costs. Times vary by ±30 %."""

    def __init__(self, decode_s: float, item_s: float, batch_s: float) -> None:
        self.batcher, self.lane = device(item_s, batch_s)
        self.stage = stage_of(decode_s)
        self.admission = Admission(AdmissionLimits(), lambda: 1.0)
        self.expectation = Expectation(self.batcher, [self.stage])
        self.now_s = 0.0
        self.answered_s: list[float] = []
        self.shed = 0
        self._costs = (decode_s, item_s, batch_s)
        self._chance = random.Random(5)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._to_decode: deque[tuple[float, Open]] = deque()
        self._to_forward: deque[tuple[float, Open]] = deque()
        self._decoding = self._forwarding = False

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), what))

    def run(self) -> None:
        while self._events:
            self.now_s, _, what = heapq.heappop(self._events)
            what()

    def arrive(self) -> None:
        part = Part(items=1, stage=self.stage, lane=self.lane)
        try:
            self.admission.check_time(self.expectation.of([part], bulk=False), DEADLINE_S)
        except OverloadedError:
            self.shed += 1
            return
        held = Open(self.stage.backlog, self.lane.backlog)
        self._to_decode.append((self.now_s, held))
        self._go_on()

    def _go_on(self) -> None:
        decode_s, item_s, batch_s = self._costs
        if self._to_decode and not self._decoding:
            self._decoding, first = True, self._to_decode.popleft()
            self.at(self.now_s + self._about(decode_s), lambda: self._decoded(first))
        if self._to_forward and not self._forwarding:
            most = self.batcher.batch_items(self.lane)
            batch = [self._to_forward.popleft() for _ in range(min(most, len(self._to_forward)))]
            self._forwarding, took_s = True, self._about(batch_s + item_s * len(batch))
            self.at(self.now_s + took_s, lambda: self._forwarded(batch, took_s))

    def _decoded(self, item: tuple[float, Open]) -> None:
        self._decoding = False
        item[1].decoded()
        self._to_forward.append(item)
        self._go_on()

    def _forwarded(self, batch: list[tuple[float, Open]], took_s: float) -> None:
        self._forwarding = False
        self.lane.cost.record(len(batch), took_s)
        for arrived_s, held in batch:
            held.answered()
            self.answered_s.append(self.now_s - arrived_s)
        self._go_on()

    def _about(self, seconds: float) -> float:
        return seconds * self._chance.uniform(0.7, 1.3)


class Open:
    """The places of one request in both backlogs."""

    def __init__(self, *backlogs: Backlog) -> None:
        self._held: list[AbstractContextManager[Callable[[], None]]] = [
            backlog.expecting(1, bulk=False) for backlog in backlogs
        ]
        self.decoded, self.answered = (held.__enter__() for held in self._held)


@pytest.mark.parametrize(
    ("decode_s", "item_s", "batch_s"),
    [(0.020, 0.004, 0.02), (0.004, 0.020, 0.0), (0.004, 0.004, 0.25), (0.001, 0.15, 0.05)],
    ids=["decoding is slower", "forwards are slower", "batches are dear", "few a second"],
)
def test_at_three_times_the_load_nearly_all_that_can_be_done_is_answered_in_time(
    decode_s: float, item_s: float, batch_s: float
) -> None:
    pipeline = Pipeline(decode_s, item_s, batch_s)
    full = min(64, max(1, int((1.0 - batch_s) / item_s)))
    peak = 1 / max(decode_s, item_s + batch_s / full)  # items a second
    window_s = 60.0
    rng = random.Random(3)
    when_s = 0.0
    while (when_s := when_s + rng.expovariate(3 * peak)) < window_s:
        pipeline.at(when_s, pipeline.arrive)
    pipeline.run()
    in_time = sum(took_s <= DEADLINE_S for took_s in pipeline.answered_s)
    assert in_time / window_s >= 0.9 * peak
    assert np.quantile(pipeline.answered_s, 0.99) <= DEADLINE_S
    assert pipeline.shed > 1.5 * len(pipeline.answered_s)
