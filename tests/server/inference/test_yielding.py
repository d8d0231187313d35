"""Training gives way to inference: who is told what, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from cliptune.errors import InvalidInputError
from cliptune_server.inference.traffic import Traffic
from cliptune_server.inference.yielding import Yielding, YieldPace

PACE = YieldPace(lease_s=0.06, renew_s=0.03, longest_s=0.15, turn_s=0.03)


class Trainers:
    """What they were told; `until` waits for it."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float]] = []
        self._changed = asyncio.Event()

    def tell(self, device: str, seconds: float) -> None:
        self.told.append((device, seconds))
        self._changed.set()

    async def until(self, wanted: Callable[[list[tuple[str, float]]], bool]) -> None:
        async with asyncio.timeout(10):
            while not wanted(self.told):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def yielding(device: str) -> AsyncIterator[tuple[Traffic, Trainers]]:
    traffic, trainers = Traffic(), Trainers()
    task = asyncio.create_task(Yielding(traffic, device=lambda: device, tell=trainers.tell, pace=PACE).run())
    try:
        yield traffic, trainers
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_trainers_of_the_device_stand_while_a_request_is_in_flight_and_then_go_on() -> None:
    async with yielding("cuda:0") as (traffic, trainers):
        with traffic.request():
            await trainers.until(lambda told: told[-2:] == [("cuda:0", PACE.lease_s)] * 2)
        await trainers.until(lambda told: told[-1] == ("cuda:0", 0.0))
        before = len(trainers.told)
        with traffic.request():
            await trainers.until(lambda told: len(told) > before)
        assert trainers.told[before] == ("cuda:0", PACE.lease_s)


async def test_many_short_requests_cost_no_more_messages_than_one_long_one() -> None:
    loop = asyncio.get_running_loop()
    async with yielding("mps") as (traffic, trainers):
        began_s, requests = loop.time(), 0
        while len(trainers.told) < 3:
            with traffic.request():
                await asyncio.sleep(0)
            requests += 1
        assert requests > 20
        assert loop.time() - began_s >= PACE.renew_s


async def test_inference_that_never_stops_leaves_training_a_turn() -> None:
    async with yielding("mps") as (traffic, trainers):
        with traffic.request():
            await trainers.until(lambda told: ("mps", 0.0) in told)
            turn = trainers.told.index(("mps", 0.0))
            await trainers.until(lambda told: len(told) > turn + 1)
        assert trainers.told[turn + 1] == ("mps", PACE.lease_s)


@pytest.mark.parametrize("device", ["cpu", ""])
async def test_nothing_is_said_where_the_cores_are_shared_or_no_engine_is_up(device: str) -> None:
    traffic, trainers, asked = Traffic(), Trainers(), asyncio.Semaphore(0)

    def told_device() -> str:
        asked.release()
        return device

    task = asyncio.create_task(Yielding(traffic, device=told_device, tell=trainers.tell, pace=PACE).run())
    with traffic.request():
        for _ in range(2):
            await asked.acquire()
    task.cancel()
    assert trainers.told == []


def test_a_pace_whose_lease_ends_before_it_is_renewed_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="renew_s"):
        YieldPace(lease_s=0.1, renew_s=0.2)
