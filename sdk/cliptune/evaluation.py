"""An evaluation as the user sees it: a frozen dataclass over the message of `job.proto`.

Made by `job.py`; part of a `Job`, and the body of a `JobEvent`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cliptune.guard import GeneralResult, GuardCurve, curve_from_message, general_from_message
from cliptune.interval import Interval
from cliptune.sweep import ResolutionSweep, sweep_from_message
from cliptune.v1 import job_pb2

__all__ = ["ClassResult", "Evaluation", "Interval", "evaluation_from_message"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassResult:
    """How one class fares. What cannot be judged (no image of it, or only images of it) is NaN."""

    label: str
    samples: int
    """Images of it."""
    precision: float
    recall: float
    auroc: float
    average_precision: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Metrics by name. `occasion`: "before", "during", "after" or "requested"."""

    step: int
    occasion: str
    samples: int
    """Images behind the metrics."""
    metrics: dict[str, float]
    main_metric: str = ""
    """Name of the one that says how good the model is. Empty: it could not be measured."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """By the same names, after training."""
    classes: tuple[ClassResult, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """[C][C] counts: row i holds images of `classes[i]`, column j those taken for `classes[j]`. Empty where
    images have several labels."""
    pictures: tuple[str, ...] = ()
    """Paths in the job's folder; the gateway serves them as /v1/jobs/{id}/PATH."""
    sweep: ResolutionSweep | None = None
    """The model over image sizes, where that was asked for."""
    general: GeneralResult | None = None
    """What it still knows beside the domain, where a guard measures it."""
    guard: GuardCurve | None = None
    """After training: how the published weights were chosen."""

    @property
    def main(self) -> float:
        """Value of the main metric; NaN where there is none."""
        return self.metrics.get(self.main_metric, float("nan"))


def evaluation_from_message(message: job_pb2.Evaluation) -> Evaluation:
    """The view of an `Evaluation`."""
    classes = len(message.classes)
    return Evaluation(
        step=message.step,
        occasion=message.occasion,
        samples=message.samples,
        metrics=dict(message.metrics),
        main_metric=message.main_metric,
        intervals={
            name: Interval(low=interval.low, high=interval.high)
            for name, interval in message.intervals.items()
        },
        classes=tuple(
            ClassResult(**{name: getattr(entry, name) for name in ClassResult.__slots__})
            for entry in message.classes
        ),
        confusion=tuple(
            tuple(message.confusion[start : start + classes])
            for start in range(0, len(message.confusion), classes or 1)
        ),
        pictures=tuple(message.pictures),
        sweep=sweep_from_message(message.sweep, message.main_metric) if message.HasField("sweep") else None,
        general=general_from_message(message.general) if message.HasField("general") else None,
        guard=curve_from_message(message.guard) if message.HasField("guard") else None,
    )
