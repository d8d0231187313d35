"""An engine that has just refused is not asked the same again for a moment."""

from __future__ import annotations

import pytest

from cliptune.errors import OverloadedError
from cliptune.v1 import inference_pb2
from cliptune_server.inference.refusals import Refusals


class Clock:
    """Told by the test."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def texts(count: int) -> inference_pb2.EmbedTextsRequest:
    return inference_pb2.EmbedTextsRequest(texts=["a red circle"] * count)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(clock: Clock) -> Refusals:
    refusals = Refusals(clock)
    error = OverloadedError("about 5.0 s of work are waiting", retry_after_s="4.0")
    refusals.note(texts(4), 1.0, error, bulk=False)
    return refusals


@pytest.mark.parametrize(("count", "timeout_s"), [(4, 1.0), (9, 1.0), (4, 0.2)])
def test_what_asks_for_no_less_hears_the_same(refusals: Refusals, count: int, timeout_s: float) -> None:
    with pytest.raises(OverloadedError, match=r"5\.0 s") as refused:
        refusals.check(texts(count), timeout_s, bulk=False)
    assert refused.value.metadata == {"retry_after_s": "4.0"}
    assert refusals.repeated == 1


def test_what_is_smaller_or_has_more_time_or_goes_another_way_is_asked_for(refusals: Refusals) -> None:
    refusals.check(texts(3), 1.0, bulk=False)
    refusals.check(texts(4), 1.1, bulk=False)
    refusals.check(texts(4), None, bulk=False)
    refusals.check(texts(4), 1.0, bulk=True)
    refusals.check(inference_pb2.EmbedImagesRequest(model="x" * 1000), 1.0, bulk=False)
    assert refusals.repeated == 0


def test_a_moment_later_the_engine_is_asked_again(refusals: Refusals, clock: Clock) -> None:
    clock.now_s += 0.049
    with pytest.raises(OverloadedError):
        refusals.check(texts(4), 1.0, bulk=False)
    clock.now_s += 0.002
    refusals.check(texts(4), 1.0, bulk=False)


def test_a_request_that_needs_too_much_memory_is_no_reason_to_refuse_others(clock: Clock) -> None:
    refusals = Refusals(clock)
    refusals.note(texts(1), 1.0, OverloadedError("not enough memory for this forward"), bulk=False)
    refusals.check(texts(1), 1.0, bulk=False)
