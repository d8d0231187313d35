"""A 95 % interval, as evaluations and guards tell it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A 95 % bootstrap interval."""

    low: float
    high: float
