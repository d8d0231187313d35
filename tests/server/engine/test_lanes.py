"""Which items share a forward, in which order, and what is never forwarded."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator

import numpy as np
import pytest
from opentelemetry.context import Context

from cliptune.errors import DeadlineExceededError, OverloadedError
from cliptune_server.engine.batcher import Batcher, BatcherConfig, Lane, Vector
from cliptune_server.engine.cost import Cost
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.spans import Caller
from tests.server.engine.test_batcher import Doubling

SIZES = {"budget_s": 1.0, "max_items": 8}


def interactive(timeout_s: float | None = None) -> Caller:
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    return Caller(context=Context(), deadline_s=deadline_s)


def bulk() -> Caller:
    return Caller(context=Context(), bulk=True)


def lane_of(cost: Cost | None = None, *, ageing_s: float = 60.0) -> Lane:
    lane = Lane(model="m:1", tower="text", forward=Doubling(), ageing_s=ageing_s)
    lane.cost = cost or cheap()
    return lane


def cheap() -> Cost:
    cost = Cost()
    cost.record(64, 0.001)
    return cost


def measured(position_s: float, batch_s: float) -> Cost:
    cost = Cost()
    for positions in (32, 512, 64, 256):
        cost.record(positions // 16, batch_s + position_s * positions, positions)
    return cost


def taken(lane: Lane, *, alone: bool = False) -> list[object]:
    return [item.payload for item in lane.take(budget_s=1.0, max_items=8, alone=alone)]


def test_the_cost_of_a_batch_is_a_line_through_those_that_were_run() -> None:
    a, b = measured(0.002, 0.03).line
    assert (a, b) == (pytest.approx(0.002, rel=1e-6), pytest.approx(0.03, rel=1e-6))
    assert measured(0.002, 0.03).batch_positions(1.0) == 485
    assert measured(0.002, 5.0).batch_positions(1.0) in (
        499,
        500,
    )  # a fixed part that no small batch gets below
    one_size = Cost()
    one_size.record(4, 0.4)
    one_size.record(4, 0.4)
    assert one_size.line == (pytest.approx(0.1), 0.0)
    falling = Cost()  # a stutter at a small batch: no cost falls with size
    falling.record(1, 5.0)
    falling.record(64, 1.0)
    assert falling.line == (pytest.approx((0.8 * 5 + 1) / (0.8 * 1 + 64)), 0.0)


async def test_what_is_interactive_goes_before_bulk_in_order_of_arrival() -> None:
    lane = lane_of()
    for name in ("b1", "b2"):
        lane.put(name, bulk())
    for name in ("i1", "i2"):
        lane.put(name, interactive())
    lane.put("b3", bulk())
    assert taken(lane) == ["i1", "i2", "b1", "b2", "b3"]


async def test_bulk_that_has_waited_for_its_ageing_goes_before_younger_interactive_items() -> None:
    lane = lane_of(ageing_s=0.0)
    lane.put("old bulk", bulk())
    lane.put("young", interactive())
    assert taken(lane) == ["old bulk", "young"]


async def test_however_much_bulk_has_aged_an_interactive_item_waits_for_one_batch_of_it() -> None:
    lane = lane_of(ageing_s=0.05)
    for number in range(40):
        lane.put(number, bulk())
    await asyncio.sleep(0.06)
    lane.put("first", interactive())
    assert taken(lane) == list(range(8))  # its turn
    lane.put("second", interactive())
    assert taken(lane) == ["first", "second", *range(8, 14)]
    lane.put("third", interactive())
    assert taken(lane)[0] == "third"
    leaders = []
    for _ in range(6):  # interactive without end: bulk leads again after its ageing
        for _ in range(8):
            lane.put("more", interactive())
        leaders.append(taken(lane)[0])
        await asyncio.sleep(0.02)
    assert leaders[0] == "more"
    assert any(leader != "more" for leader in leaders)


async def test_a_batch_that_is_full_leaves_the_rest_in_its_order() -> None:
    lane = lane_of()
    for number in range(20):
        lane.put(number, bulk() if number % 2 else interactive())
    first = taken(lane)
    assert first == [0, 2, 4, 6, 8, 10, 12, 14]
    assert taken(lane) == [16, 18, 1, 3, 5, 7, 9, 11]
    assert taken(lane) == [13, 15, 17, 19]
    assert len(lane) == 0


async def test_items_of_another_shape_never_share_a_batch() -> None:
    lane = lane_of()
    for number in range(6):
        lane.put(number, interactive(), shape=(3, 32 + number % 2))
    assert taken(lane) == [0, 2, 4]
    assert taken(lane) == [1, 3, 5]


async def test_texts_of_other_lengths_join_where_padding_costs_less_than_a_forward_more() -> None:
    lengths = (16, 24, 77, 16, 24)
    dear = lane_of(measured(0.001, 0.05))  # a forward is worth 50 positions
    free = lane_of(measured(0.001, 0.0))
    for lane in (dear, free):
        for number, length in enumerate(lengths):
            lane.put(number, interactive(), length=length)
    assert taken(dear) == [0, 1, 3, 4]
    assert taken(dear) == [2]
    assert [taken(free) for _ in range(3)] == [[0, 3], [1, 4], [2]]


async def test_a_batch_takes_no_more_positions_than_its_time_allows() -> None:
    lane = lane_of(measured(0.01, 0.0))
    for number in range(8):
        lane.put(number, interactive(), length=32)
    assert taken(lane) == [0, 1, 2]  # 96 of 100 positions


async def test_a_batch_ends_before_the_deadline_of_the_first_in_it() -> None:
    lane = lane_of(measured(0.01, 0.0))
    lane.put("hurried", interactive(0.5), length=16)
    for number in range(4):
        lane.put(number, interactive(), length=16)
    assert taken(lane) == ["hurried", 0, 1]


async def test_what_cannot_be_answered_in_time_is_told_before_its_forward() -> None:
    lane = lane_of(measured(0.01, 0.0))
    hopeless = lane.put("hopeless", interactive(0.05), length=16)
    lane.put("other", interactive(), length=16)
    assert taken(lane) == ["other"]
    with pytest.raises(DeadlineExceededError, match="would have been over"):
        await hopeless
    assert lane.expired == 1
    lane.put("alone", interactive(0.05), length=16)  # the cost may be wrong: it is measured again
    assert taken(lane, alone=True) == ["alone"]


async def test_padding_and_sizes_of_batches_are_counted() -> None:
    lane = lane_of()
    for number, length in enumerate((16, 16, 24)):
        lane.put(number, interactive(), length=length)
    lane.cost = measured(0.001, 1.0)
    lane.ran(lane.take(budget_s=5.0, max_items=8, alone=False), 0.1)
    assert (lane.items, lane.positions, lane.padding, lane.sizes[2]) == (3, 72, 16, 1)


@pytest.fixture
async def batcher() -> AsyncIterator[Batcher]:
    batcher = Batcher(progress=Progress(), threads=lambda: None, config=BatcherConfig(max_items=4))
    batcher.start()
    yield batcher
    await batcher.close()


async def test_an_interactive_item_goes_before_bulk_that_is_prepared_already(batcher: Batcher) -> None:
    prepared: list[list[float]] = []
    forward = Doubling()

    def prepare(payloads: list[float]) -> list[float]:
        prepared.append(list(payloads))
        return list(payloads)

    lane = batcher.open("m:1", "image", forward, prepare)  # type: ignore[arg-type]
    lane.cost.record(64, 0.001)
    forward.free.clear()
    answers = [batcher.submit(lane, 0.0, bulk())]
    await forward.begun()
    answers += [batcher.submit(lane, float(number), bulk()) for number in range(1, 6)]
    await asyncio.to_thread(lambda: None)
    answers.append(batcher.submit(lane, 99.0, interactive()))
    forward.free.set()
    await asyncio.gather(*answers)
    assert prepared[1] == [1.0, 2.0, 3.0, 4.0]  # while the first ran
    assert forward.batches == [[0.0], [99.0, 5.0], [1.0, 2.0, 3.0, 4.0]]


async def test_a_cancelled_item_of_a_prepared_batch_never_enters_a_forward(batcher: Batcher) -> None:
    forward = Doubling()
    lane = batcher.open("m:1", "image", forward)
    lane.cost.record(64, 0.001)
    forward.free.clear()
    answers = [batcher.submit(lane, 0.0, interactive())]
    await forward.begun()
    answers += [batcher.submit(lane, float(number), interactive()) for number in range(1, 5)]
    answers.pop(2).cancel()
    forward.free.set()
    await asyncio.gather(*answers)
    assert forward.batches == [[0.0], [1.0, 3.0, 4.0]]


async def test_each_of_10000_fuzzed_items_is_answered_and_none_that_was_given_up_is_forwarded() -> None:
    chance = random.Random(11)
    forwarded: set[int] = set()
    given_up: set[int] = set()

    def forward(payloads: list[int]) -> Vector:
        assert not given_up.intersection(payloads), "a cancelled item was forwarded"
        if any(payload % 211 == 0 for payload in payloads):
            raise RuntimeError("poisoned")
        if len(payloads) > 24:
            raise OverloadedError("the device has not enough memory for this forward")
        forwarded.update(payloads)
        return np.array(
            [[np.nan if payload % 97 == 0 else payload] for payload in payloads], dtype=np.float32
        )

    batcher = Batcher(progress=Progress(), threads=lambda: None, config=BatcherConfig(max_items=32))
    batcher.start()
    lanes = [batcher.open("m:1", tower, forward, list) for tower in ("image", "text")]  # type: ignore[arg-type]
    answers: dict[int, asyncio.Future[Vector]] = {}
    for number in range(10_000):
        deadline_s = time.monotonic() + chance.choice([-1.0, 60.0]) if chance.random() < 0.1 else None
        caller = Caller(context=Context(), deadline_s=deadline_s, bulk=chance.random() < 0.5)
        answers[number] = batcher.submit(
            chance.choice(lanes),
            number,
            caller,
            shape=chance.choice([None, (3, 32)]),
            length=chance.choice([16, 24, 77]),
            urgent=chance.random() < 0.01,
        )
        if chance.random() < 0.05:
            victim = chance.randrange(number + 1)
            # Given up before its forward, or too late to matter: a forward may hold it already.
            if answers[victim].cancel() and not any(lane.running for lane in lanes):
                given_up.add(victim)
        if chance.random() < 0.02:
            await asyncio.sleep(0)
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*answers.values(), return_exceptions=True)
    await batcher.close()
    kinds = Counter(type(outcome).__name__ for outcome in outcomes)
    assert set(kinds) == {"ndarray", "InternalError", "DeadlineExceededError", "CancelledError"}
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, np.ndarray):
            assert outcome[0] == number
            assert number % 211
            assert number % 97
    assert not forwarded & given_up
