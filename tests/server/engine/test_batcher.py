from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
import torch
from opentelemetry.context import Context

from cliptune.errors import (
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    UnavailableError,
)
from cliptune_server.engine.batcher import Batcher, BatcherConfig, Lane, Vector
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.spans import Caller

ANYONE = Caller(context=Context())


class Doubling:
    """A forward that doubles its scalars; it can be held, and remembers the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.entered = threading.Semaphore(0)
        self.free = threading.Event()
        self.free.set()

    def __call__(self, payloads: Sequence[float]) -> Vector:
        self.entered.release()
        assert self.free.wait(20)
        self.batches.append(list(payloads))
        return np.array([[2 * value] for value in payloads], dtype=np.float32)

    async def begun(self) -> None:
        """Returns when a forward has begun since the last call."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=20)


@pytest.fixture
async def batcher() -> AsyncIterator[Batcher]:
    batcher = Batcher(progress=Progress(), threads=lambda: torch.set_num_threads(1), config=BatcherConfig())
    batcher.start()
    yield batcher
    await batcher.close()


def open_lane(batcher: Batcher, forward: Doubling, tower: str = "text") -> Lane:
    lane = batcher.open("m:1", tower, forward)
    lane.cost.record(64, 0.001)  # known to be cheap
    return lane


async def test_an_idle_device_takes_a_lone_item_at_once(batcher: Batcher) -> None:
    forward = Doubling()
    lane = open_lane(batcher, forward)
    assert await batcher.submit(lane, 3.0, ANYONE) == np.float32(6)
    assert forward.batches == [[3.0]]


async def test_what_waits_while_the_device_is_busy_leaves_as_one_batch(batcher: Batcher) -> None:
    forward = Doubling()
    lane = open_lane(batcher, forward)
    forward.free.clear()
    first = batcher.submit(lane, 0.0, ANYONE)
    await forward.begun()
    rest = [batcher.submit(lane, float(value), ANYONE) for value in range(1, 41)]
    forward.free.set()
    answers = await asyncio.gather(first, *rest)
    assert [float(answer[0]) for answer in answers] == [2.0 * value for value in range(41)]
    assert [len(batch) for batch in forward.batches] == [1, 40]
    assert (lane.batches, lane.items) == (2, 41)


async def test_a_batch_takes_about_the_time_budget_by_measured_cost(batcher: Batcher) -> None:
    forward = Doubling()
    lane = batcher.open("m:1", "image", forward)
    lane.cost.record(64, 64 * 0.1)  # 0.1 s an item
    forward.free.clear()
    answers = [batcher.submit(lane, 0.0, ANYONE)]
    await forward.begun()
    answers += [batcher.submit(lane, 1.0, ANYONE) for _ in range(20)]
    item_s = lane.cost.item_s
    assert item_s is not None
    assert lane.cost.batch_items(budget_s=1.0, max_items=64) == 10
    forward.free.set()
    await asyncio.gather(*answers)
    assert len(forward.batches[1]) <= 20


async def test_items_on_which_the_forward_raises_fail_alone(batcher: Batcher) -> None:
    table = torch.nn.Embedding(10, 4)

    @torch.inference_mode()
    def look_up(rows: Sequence[int]) -> Vector:
        found: Vector = table(torch.tensor(list(rows))).numpy()  # raises for a row that is not there
        return found

    lane = batcher.open("m:1", "text", look_up)
    lane.cost.record(64, 0.001)
    places = [1, 2, 99, 3, 4, 5, 77, 6, 7, 8, 9, 0, 1]
    answers = await asyncio.gather(
        *(batcher.submit(lane, place, ANYONE) for place in places), return_exceptions=True
    )
    for place, answer in zip(places, answers, strict=True):
        if place > 9:
            assert isinstance(answer, InternalError)
            assert "failed on this item" in answer.message
        else:
            np.testing.assert_array_equal(answer, table.weight[place].detach().numpy())


async def test_a_row_of_nan_is_an_error_of_its_item_alone(batcher: Batcher) -> None:
    lane = open_lane(batcher, Doubling())
    values = [1.0, float("nan"), 2.0, float("inf")]
    answers = await asyncio.gather(
        *(batcher.submit(lane, value, ANYONE) for value in values), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [np.ndarray, InternalError, np.ndarray, InternalError]


async def test_a_forward_with_the_wrong_number_of_rows_answers_with_an_error(batcher: Batcher) -> None:
    lane = batcher.open("m:1", "text", lambda payloads: np.zeros((len(payloads) + 1, 2), dtype=np.float32))
    with pytest.raises(InternalError, match="answered with shape"):
        await batcher.submit(lane, 1.0, ANYONE)


async def test_callers_that_have_gone_or_are_late_are_dropped_before_the_forward(batcher: Batcher) -> None:
    forward = Doubling()
    lane = open_lane(batcher, forward)
    forward.free.clear()
    first = batcher.submit(lane, 0.0, ANYONE)
    await forward.begun()
    gone = batcher.submit(lane, 1.0, ANYONE)
    late = batcher.submit(lane, 2.0, Caller(context=Context(), deadline_s=time.monotonic()))
    stays = batcher.submit(lane, 3.0, Caller(context=Context(), deadline_s=time.monotonic() + 60))
    gone.cancel()
    forward.free.set()
    await asyncio.gather(first, stays)
    with pytest.raises(DeadlineExceededError):
        await late
    assert forward.batches == [[0.0], [3.0]]


async def test_a_batch_too_large_for_the_devices_memory_is_halved_and_stays_so(batcher: Batcher) -> None:
    sizes: list[int] = []

    def small_device(payloads: Sequence[float]) -> Vector:
        sizes.append(len(payloads))
        if len(payloads) > 4:
            raise OverloadedError("the device has not enough memory for this forward")
        return np.zeros((len(payloads), 2), dtype=np.float32)

    lane = batcher.open("m:1", "image", small_device)
    lane.cost.record(64, 0.001)
    await asyncio.gather(*(batcher.submit(lane, 0.0, ANYONE) for _ in range(16)))
    sizes.clear()
    await asyncio.gather(*(batcher.submit(lane, 0.0, ANYONE) for _ in range(16)))
    assert max(sizes) <= 4


async def test_the_lane_that_has_waited_longest_goes_next_and_an_urgent_item_before_all(
    batcher: Batcher,
) -> None:
    images, texts = Doubling(), Doubling()
    image_lane, text_lane = open_lane(batcher, images, "image"), open_lane(batcher, texts)
    images.free.clear()
    order: list[str] = []

    def note(name: str, answer: asyncio.Future[Vector]) -> asyncio.Future[Vector]:
        answer.add_done_callback(lambda _: order.append(name))
        return answer

    answers = [note("first image", batcher.submit(image_lane, 0.0, ANYONE))]
    await images.begun()
    answers.append(note("text", batcher.submit(text_lane, 1.0, ANYONE)))
    answers.append(note("second image", batcher.submit(image_lane, 2.0, ANYONE)))
    answers.append(note("urgent image", batcher.submit(image_lane, 3.0, ANYONE, urgent=True)))
    images.free.set()
    await asyncio.gather(*answers)
    assert order.index("urgent image") < order.index("text")
    assert images.batches[1][0] == 3.0


async def test_closing_answers_what_still_waits(batcher: Batcher) -> None:
    forward = Doubling()
    lane = open_lane(batcher, forward)
    forward.free.clear()
    running = batcher.submit(lane, 1.0, ANYONE)
    await forward.begun()
    waiting = batcher.submit(lane, 2.0, ANYONE)
    closing = asyncio.create_task(batcher.close())
    with pytest.raises(UnavailableError):
        await waiting
    forward.free.set()
    await closing
    assert float((await running)[0]) == 2.0
    with pytest.raises(UnavailableError):
        batcher.submit(lane, 3.0, ANYONE)


async def test_a_forward_in_progress_has_an_age_and_a_limit() -> None:
    progress = Progress()
    batcher = Batcher(progress=progress, threads=lambda: None, config=BatcherConfig())
    batcher.start()
    forward = Doubling()
    lane = open_lane(batcher, forward)
    assert progress.worst().age_s == 0
    forward.free.clear()
    answer = batcher.submit(lane, 1.0, ANYONE)
    await forward.begun()
    working = progress.worst()
    assert 0 < working.age_s < working.limit_s
    assert 5 <= working.limit_s < 6  # measured as cheap
    forward.free.set()
    await answer
    await batcher.close()
    assert progress.worst().age_s == 0
