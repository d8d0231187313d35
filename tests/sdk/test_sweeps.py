from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cliptune.sweep import ResolutionSweep, SizeResult


def size(side: int, value: float, latency_ms: float) -> SizeResult:
    return SizeResult(
        height=side,
        width=side,
        metrics={"accuracy": value},
        images_per_second=1000 / latency_ms,
        batch_size=1,
        latency_ms=latency_ms,
        memory_bytes=1,
    )


SWEEP = ResolutionSweep(
    main_metric="accuracy", sizes=(size(32, 0.5, 1.0), size(64, 0.7, 3.0), size(96, 0.7, 9.0))
)


@pytest.mark.parametrize(("budget_ms", "side"), [(0.0, 64), (9.0, 64), (3.0, 64), (2.9, 32)])
def test_the_best_size_is_the_quickest_of_the_most_accurate_that_keep_to_the_budget(
    budget_ms: float, side: int
) -> None:
    best = replace(SWEEP, latency_budget_ms=budget_ms).best
    assert best is not None
    assert best.told == str(side)


def test_no_size_is_best_where_none_keeps_to_the_budget_or_none_was_measured() -> None:
    assert replace(SWEEP, latency_budget_ms=0.5).best is None
    assert replace(SWEEP, sizes=(size(32, math.nan, 1.0),)).best is None
