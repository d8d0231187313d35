from __future__ import annotations

import numpy as np
import pytest

from cliptune.errors import InvalidInputError, OverloadedError, RequestTooLargeError
from cliptune_server.engine.admission import Admission, AdmissionLimits
from cliptune_server.engine.cost import Cost
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.vectors import VectorCache


def test_a_full_engine_says_when_to_come_back() -> None:
    admission = Admission(AdmissionLimits(total_items=10, total_bytes=1000), backlog_s=lambda: 2.5)
    with admission.room(8, 100):
        with pytest.raises(OverloadedError) as refused, admission.room(3, 100):
            pass
        assert refused.value.metadata["retry_after_s"] == "2.5"
        with pytest.raises(OverloadedError), admission.room(1, 901):
            pass
        with admission.room(2, 900):
            pass
    assert (admission.items, admission.bytes) == (0, 0)


def test_bulk_leaves_a_quarter_of_the_room_to_what_is_interactive() -> None:
    admission = Admission(AdmissionLimits(total_items=100, total_bytes=1000), backlog_s=lambda: 1.0)
    with admission.room(70, 100, bulk=True):
        with pytest.raises(OverloadedError), admission.room(6, 1, bulk=True):
            pass
        with admission.room(30, 900):
            pass


def test_an_empty_engine_takes_a_request_larger_than_its_room() -> None:
    admission = Admission(AdmissionLimits(total_items=10, total_bytes=1000), backlog_s=lambda: 0.0)
    with admission.room(100, 10_000):
        assert admission.items == 100


def test_room_is_given_back_when_a_request_fails() -> None:
    admission = Admission(AdmissionLimits(), backlog_s=lambda: 0.0)
    with pytest.raises(ZeroDivisionError), admission.room(5, 50):
        raise ZeroDivisionError
    assert (admission.items, admission.bytes) == (0, 0)


def test_a_request_with_too_many_items_is_refused_with_the_limit() -> None:
    admission = Admission(AdmissionLimits(request_items=4), backlog_s=lambda: 0.0)
    admission.check_count("images", 4)
    with pytest.raises(RequestTooLargeError, match="5 images") as refused:
        admission.check_count("images", 5)
    assert refused.value.metadata == {"field": "images", "limit": "4"}


def test_limits_that_make_no_sense_are_refused_with_their_value() -> None:
    with pytest.raises(InvalidInputError, match="-1"):
        AdmissionLimits(total_items=-1)


def test_batches_grow_step_by_step_up_to_the_time_budget() -> None:
    cost = Cost()
    sizes = []
    for _ in range(8):
        size = cost.batch_items(budget_s=1.0, max_items=64)
        sizes.append(size)
        cost.record(size, 0.01 + 0.02 * size)
    assert sizes[:3] == [4, 16, 41] or sizes[:2] == [4, 16]
    assert 30 <= sizes[-1] <= 50


def test_a_slow_item_goes_alone_and_a_warm_up_is_forgotten() -> None:
    cost = Cost()
    cost.record(1, 8.0)
    assert cost.batch_items(budget_s=1.0, max_items=64) == 1
    for _ in range(12):
        cost.record(1, 0.1)
    assert cost.batch_items(budget_s=1.0, max_items=64) > 1


def test_the_stall_limit_follows_the_measured_cost_and_is_generous_before() -> None:
    cost = Cost()
    assert cost.stall_limit_s(1) == 60
    cost.record(10, 0.001)
    assert 5 <= cost.stall_limit_s(64) < 5.1
    cost.record(10, 1000.0)
    assert cost.stall_limit_s(10) > 1000


def test_the_work_nearest_to_its_limit_is_reported() -> None:
    progress = Progress()
    with progress.working(1000.0):
        with progress.working(0.001):
            assert progress.worst().limit_s == 0.001
        assert progress.worst().limit_s == 1000.0
    assert progress.worst().age_s == 0


def test_class_vectors_are_remembered_within_bounds() -> None:
    cache = VectorCache(max_classes=2, max_chars=100)
    vectors = {name: np.full(2, ord(name), dtype=np.float32) for name in "abc"}
    for name in "ab":
        cache.put([name], vectors[name])
    assert cache.get(["a"]) is vectors["a"]
    cache.put(["c"], vectors["c"])
    assert cache.get(["b"]) is None  # the least recently used
    assert cache.get(["a"]) is vectors["a"]
    cache.put(["x" * 99], vectors["a"])
    assert len(cache) == 2
    cache.put(["y" * 1000], vectors["b"])
    assert len(cache) == 0
