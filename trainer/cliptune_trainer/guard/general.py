"""What a probe finds of a model's general knowledge.

Made by `probe` and `agreement`; told in evaluations, weighed by `curve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cliptune.evaluation import Interval
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip


@dataclass(frozen=True, kw_only=True, slots=True)
class General:
    """Metrics by name, of which one counts; `interval` is of that one."""

    metrics: Mapping[str, float]
    main_metric: str
    samples: int
    interval: Interval | None = None

    @property
    def value(self) -> float:
        """Of the one that counts."""
        return self.metrics[self.main_metric]

    def told(self, start: float) -> job_pb2.GeneralResult:
        """As part of an event; `start`: the starting model's value."""
        result = job_pb2.GeneralResult(
            metrics=dict(self.metrics),
            main_metric=self.main_metric,
            loss=start - self.value,
            samples=self.samples,
        )
        if self.interval is not None:
            result.interval.CopyFrom(job_pb2.Interval(low=self.interval.low, high=self.interval.high))
        return result


class Probe(Protocol):
    """Measures general knowledge."""

    def remember(self, clip: Clip) -> General:
        """Measures the starting model, and keeps what later ones are compared with."""

    def measure(self, clip: Clip, *, resamples: int) -> General:
        """Measures a model; `resamples` behind the interval, 0: none."""
