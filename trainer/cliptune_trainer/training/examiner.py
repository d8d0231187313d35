"""An evaluation at an occasion of a run: measured, drawn and told.

Enters: the step and the occasion. Leaves: an event, and a picture in the job's folder. Called by the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from cliptune.metric_names import ACCURACY
from cliptune.sweep import ResolutionSweep
from cliptune.tracing import tracer
from cliptune_model.clip import Clip
from cliptune_model.proven_sizes import ProvenSize
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.evaluation.confusion_picture import draw_confusion
from cliptune_trainer.evaluation.degrade import Degrade
from cliptune_trainer.evaluation.measure import evaluate
from cliptune_trainer.evaluation.measurement import EvaluationInterrupted, Measurement
from cliptune_trainer.evaluation.sweep import proven_sizes
from cliptune_trainer.guard.curve import Curve
from cliptune_trainer.guard.guard import Guard
from cliptune_trainer.guard.picture import draw_curve
from cliptune_trainer.job import JobFolder
from cliptune_trainer.plan.decide import Decisions
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec import Spec
from cliptune_trainer.training.sweeping import keep_sweep, sweep_after_training

# Those that a person looks at; drawing takes longer than measuring a small split.
_DRAWN: Final = ("after", "requested")


class Examiner:
    """Measures one run's model on its validation rows, at the size that it is trained for.

    Attributes:
        proven: the sizes that the trained model was measured at.
    """

    def __init__(
        self,
        *,
        job: JobFolder,
        spec: Spec,
        dataset: Dataset,
        clip: Clip,
        decisions: Decisions,
        reporter: Reporter,
        guard: Guard,
        interrupted: Callable[[], bool],
    ) -> None:
        self._job, self._spec, self._dataset = job, spec, dataset
        self._clip = clip.at(decisions.sizes.target)
        self._decisions, self._reporter, self._interrupted = decisions, reporter, interrupted
        self.proven: tuple[ProvenSize, ...] = ()
        self._guard = guard

    def __call__(self, step: int, occasion: str) -> dict[str, float] | None:
        """The metrics; None when the evaluation gave way to an instruction that ends the attempt."""
        config = self._spec.evaluation
        resamples = config.bootstrap_samples if occasion == "after" else 0
        with tracer().start_as_current_span("evaluate", attributes={"occasion": occasion, "step": step}):
            try:
                curve = None
                if occasion == "after":
                    curve = self._guard.choose(self._main_metric, resamples=resamples)
                with self._guard.counted():
                    measured = self._measure(resamples)
                    sweep = self._swept(measured, occasion)
                    general = self._guard.general(step, resamples=resamples)
            except EvaluationInterrupted:
                return None
            pictures = self._draw(measured, step) if occasion in _DRAWN else ()
            if sweep is not None:
                self.proven = proven_sizes(sweep)
                pictures += keep_sweep(self._job, self._spec.name, sweep, step, self._reporter)
        if measured.unreadable:
            self._reporter.notice(
                "images-unreadable", f"{measured.unreadable} validation images cannot be read any more"
            )
        if resamples and measured.metrics and not measured.intervals:
            told = "no intervals: all validation rows are of one group or image, which is not to be resampled"
            self._reporter.notice("no-intervals", told, warning=False)
        result = measured.told(step, occasion, pictures)
        if sweep is not None:
            result.sweep.CopyFrom(sweep.to_message())
        if general is not None:
            known, start = general
            result.general.CopyFrom(known.told(start))
            if curve is not None:
                picture = self._draw_curve(curve, measured.main_metric, known.main_metric, step)
                result.guard.CopyFrom(curve.told(picture=picture, ema_decay=self._spec.guard.ema_decay))
        self._reporter.evaluation(result)
        return measured.metrics

    def _at(self, clip: Clip, degrade: Degrade | None) -> Measurement:
        """Without intervals."""
        return self._measure(0, clip, degrade)

    def _swept(self, measured: Measurement, occasion: str) -> ResolutionSweep | None:
        if occasion != "after":
            return None
        return sweep_after_training(self._spec, self._decisions, self._clip, measured, self._at)

    def _measure(
        self, resamples: int, clip: Clip | None = None, degrade: Degrade | None = None
    ) -> Measurement:
        config = self._spec.evaluation
        return evaluate(
            clip or self._clip,
            self._dataset.validation,
            self._decisions.classes,
            batch_size=config.batch_size,
            several_labels=bool(self._spec.data.label_separator),
            main_metric=self._decisions.main_metric,
            bootstrap_samples=resamples,
            degrade=degrade,
            interrupted=self._interrupted,
        )

    def _main_metric(self) -> float:
        measured = self._measure(0)
        return measured.metrics.get(measured.main_metric, math.nan)

    def _draw_curve(self, curve: Curve, domain_metric: str, general_metric: str, step: int) -> str:
        """Its path in the job's folder; "": there is no room for it."""
        path = self._job.pictures / f"guard-{step:08d}.png"
        try:
            draw_curve(curve, f"{self._spec.name}, step {step}", domain_metric, general_metric, path)
        except OSError as error:
            self._reporter.notice("picture-failed", f"{path.name} cannot be written: {error.strerror}")
            return ""
        return path.relative_to(self._job.path).as_posix()

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
