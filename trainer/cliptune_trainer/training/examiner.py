"""An evaluation at an occasion of a run: measured, drawn and told.

Enters: the step and the occasion. Leaves: an event, and a picture in the job's folder. Called by the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cliptune.metric_names import ACCURACY
from cliptune.tracing import tracer
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.evaluation.confusion_picture import draw_confusion
from cliptune_trainer.evaluation.measure import evaluate
from cliptune_trainer.evaluation.measurement import EvaluationInterrupted, Measurement
from cliptune_trainer.job import JobFolder
from cliptune_trainer.plan.decide import Decisions
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec import Spec

# Those that a person looks at; drawing takes longer than measuring a small split.
_DRAWN: Final = ("after", "requested")


class Examiner:
    """Measures one run's model on its validation rows."""

    def __init__(
        self,
        *,
        job: JobFolder,
        spec: Spec,
        dataset: Dataset,
        clip: Clip,
        decisions: Decisions,
        reporter: Reporter,
        interrupted: Callable[[], bool],
    ) -> None:
        self._job, self._spec, self._dataset, self._clip = job, spec, dataset, clip
        self._decisions, self._reporter, self._interrupted = decisions, reporter, interrupted

    def __call__(self, step: int, occasion: str) -> dict[str, float] | None:
        """The metrics; None when the evaluation gave way to an instruction that ends the attempt."""
        config = self._spec.evaluation
        resamples = config.bootstrap_samples if occasion == "after" else 0
        with tracer().start_as_current_span("evaluate", attributes={"occasion": occasion, "step": step}):
            try:
                measured = evaluate(
                    self._clip,
                    self._dataset.validation,
                    self._decisions.classes,
                    batch_size=config.batch_size,
                    several_labels=bool(self._spec.data.label_separator),
                    main_metric=self._decisions.main_metric,
                    bootstrap_samples=resamples,
                    interrupted=self._interrupted,
                )
            except EvaluationInterrupted:
                return None
            pictures = self._draw(measured, step) if occasion in _DRAWN else ()
        if measured.unreadable:
            self._reporter.notice(
                "images-unreadable", f"{measured.unreadable} validation images cannot be read any more"
            )
        if resamples and measured.metrics and not measured.intervals:
            told = "no intervals: all validation rows are of one group or image, which is not to be resampled"
            self._reporter.notice("no-intervals", told, warning=False)
        self._reporter.evaluation(step, occasion, measured, pictures)
        return measured.metrics

    def _draw(self, measured: Measurement, step: int) -> tuple[str, ...]:
        """Paths in the job's folder."""
        path = self._job.pictures / f"confusion-{step:08d}.png"
        title = f"{self._spec.name}, step {step}: accuracy {measured.metrics.get(ACCURACY, 0.0):.3f}"
        try:
            drawn = draw_confusion(measured, title, path)
        except OSError as error:  # a full disk: the numbers are told all the same
            self._reporter.notice("picture-failed", f"{path.name} cannot be written: {error.strerror}")
            return ()
        return (path.relative_to(self._job.path).as_posix(),) if drawn else ()
