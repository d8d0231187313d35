"""What a guard tells of a model's general knowledge: frozen dataclasses over messages of `job.proto`.

Made by `evaluation.py`; parts of an `Evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cliptune.interval import Interval
from cliptune.v1 import job_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneralResult:
    """What a model still knows of what it knew before training."""

    metrics: dict[str, float]
    """As of an evaluation; or "agreement": 1 is the starting model's own."""
    main_metric: str
    loss: float
    """Of the main metric: the starting model's value less this one's."""
    samples: int
    interval: Interval | None
    """Of the main metric, after training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardPoint:
    """A model at a share of the way from the starting weights to the trained ones."""

    share: float
    domain: float
    domain_gain: float
    general: float
    general_loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardCurve:
    """How the published weights were chosen."""

    points: tuple[GuardPoint, ...]
    """By share, the starting model first."""
    chosen: int
    """Place of the published one."""
    tolerance: float
    """General loss that was allowed."""
    reason: str
    picture: str
    """Path in the job's folder; the gateway serves it as /v1/jobs/{id}/PATH. Empty: there is none."""
    ema_decay: float
    """The trained weights were a running mean with this decay; 0: they were not."""


def general_from_message(message: job_pb2.GeneralResult) -> GeneralResult:
    """The view of a `GeneralResult`."""
    interval = Interval(low=message.interval.low, high=message.interval.high)
    return GeneralResult(
        metrics=dict(message.metrics),
        main_metric=message.main_metric,
        loss=message.loss,
        samples=message.samples,
        interval=interval if message.HasField("interval") else None,
    )


def curve_from_message(message: job_pb2.GuardCurve) -> GuardCurve:
    """The view of a `GuardCurve`."""
    points = tuple(
        GuardPoint(**{name: getattr(point, name) for name in GuardPoint.__slots__})
        for point in message.points
    )
    return GuardCurve(
        points=points,
        chosen=message.chosen,
        tolerance=message.tolerance,
        reason=message.reason,
        picture=message.picture,
        ema_decay=message.ema_decay,
    )
