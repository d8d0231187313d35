"""What an evaluation finds.

Made by `evaluate`, told by the reporter, drawn by `confusion_picture`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from cliptune.evaluation import ClassResult, Interval
from cliptune.v1 import job_pb2

# Beyond these a table would weigh more than all the other events of a job.
MOST_CLASSES_TOLD: Final = 1000
MOST_CLASSES_CONFUSED: Final = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was measured on one split.

    Attributes:
        metrics: by name (`cliptune.metric_names`); one that cannot be told is left out.
        samples: images behind them.
        unreadable: images that could not be opened.
        main_metric: the one that says how good the model is. Empty: it could not be measured.
        intervals: of metrics, by the same names. Empty: not asked for.
        classes: one by one, in the order of the spec or of the labels.
        confusion: [C][C] counts: row i holds images of class i, column j those taken for class j. Empty where
            images have several labels.
    """

    metrics: dict[str, float]
    samples: int
    unreadable: int
    main_metric: str = ""
    intervals: dict[str, Interval] = field(default_factory=dict)
    classes: tuple[ClassResult, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()

    def told(self, step: int, occasion: str, pictures: Sequence[str]) -> job_pb2.Evaluation:
        """As an event. Of very many classes the metrics alone are told, and the picture."""
        classes = self.classes if len(self.classes) <= MOST_CLASSES_TOLD else ()
        confusion = self.confusion if len(self.confusion) <= MOST_CLASSES_CONFUSED else ()
        return job_pb2.Evaluation(
            step=step,
            occasion=occasion,
            metrics=self.metrics,
            samples=self.samples,
            intervals={
                name: job_pb2.Interval(low=interval.low, high=interval.high)
                for name, interval in self.intervals.items()
            },
            classes=[job_pb2.ClassResult(**asdict(entry)) for entry in classes],
            confusion=[count for row in confusion for count in row],
            main_metric=self.main_metric,
            pictures=pictures,
        )


class EvaluationInterrupted(Exception):  # noqa: N818 - not an error
    """An instruction that ends the attempt came first; nothing was measured."""
