"""Intervals by resampling what was measured.

Enters: a statistic of weighted samples, and which samples belong together. Leaves: 95 % intervals by name.
Called by `evaluate`.

B: resamples, N: samples, U: units that are drawn (images, or groups of them).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from cliptune.evaluation import Interval
from cliptune_trainer.evaluation.metrics import Floats, Integers

Statistic = Callable[[Floats], Mapping[str, Floats]]
"""Weights [B, N] → values [B] by name; NaN where a resample says nothing."""

_OUTSIDE_PERCENT: Final = (2.5, 97.5)
# Of the resamples of one block: B × N.
_WEIGHTS_AT_ONCE: Final = 2_000_000
_SEED: Final = 0


def intervals(
    statistic: Statistic, units_N: Integers, *, resamples: int, check: Callable[[], None]
) -> dict[str, Interval]:
    """95 % percentile intervals (Efron 1979; whole units are drawn: Field & Welsh 2007).

    Samples of one unit are drawn together: images of one patient are no independent evidence. The same data
    gives the same resamples, so intervals do not change from run to run.

    Args:
        statistic: what to measure.
        units_N: the unit of each sample.
        resamples: how many.
        check: called between blocks of resamples; may raise.

    Returns:
        Nothing where there are fewer than two units; nothing for a metric that most resamples cannot tell.
    """
    units, places_N = np.unique(units_N, return_inverse=True)
    if len(units) < 2 or resamples < 1:
        return {}
    generator = np.random.default_rng(_SEED)
    block = max(1, _WEIGHTS_AT_ONCE // max(len(units_N), len(units)))
    values: defaultdict[str, list[Floats]] = defaultdict(list)
    for start in range(0, resamples, block):
        check()
        counts_BU = _draw(generator, min(block, resamples - start), len(units))
        for name, values_B in statistic(counts_BU[:, places_N]).items():
            values[name].append(values_B)
    found = {name: np.concatenate(parts) for name, parts in values.items()}
    return {
        name: _interval(known)
        for name, values_B in found.items()
        if len(known := values_B[~np.isnan(values_B)]) > resamples / 2
    }


def _draw(generator: np.random.Generator, resamples: int, units: int) -> Floats:
    """How often each unit is in each resample: U draws with replacement. [B, U]"""
    drawn_BU = generator.integers(0, units, (resamples, units))
    drawn_BU += units * np.arange(resamples)[:, None]
    counts = np.bincount(drawn_BU.reshape(-1), minlength=resamples * units)
    return counts.reshape(resamples, units).astype(np.float64)


def _interval(values: Floats) -> Interval:
    low, high = np.percentile(values, _OUTSIDE_PERCENT)
    return Interval(low=float(low), high=float(high))
