"""The sweep over image sizes at the end of a run: measured, drawn, kept for the export.

Enters: the trained model and what was measured at its own size. Leaves: a `ResolutionSweep`,
`resolutions.json` and a picture in the job's folder. Called by the examiner after training.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from cliptune.durable import write_atomically
from cliptune.sweep import ResolutionSweep
from cliptune_model.clip import Clip
from cliptune_trainer.evaluation.degrade import Degrade
from cliptune_trainer.evaluation.measurement import Measurement
from cliptune_trainer.evaluation.sweep import sweep_sizes
from cliptune_trainer.evaluation.sweep_picture import draw_sweep
from cliptune_trainer.job import JobFolder
from cliptune_trainer.plan.decide import Decisions
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec import Spec


def sweep_after_training(
    spec: Spec,
    decisions: Decisions,
    clip: Clip,
    measured: Measurement,
    measure: Callable[[Clip, Degrade | None], Measurement],
) -> ResolutionSweep | None:
    """None: none was asked for, or there is no metric to compare sizes by. May raise `EvaluationInterrupted`.

    `measured`: at the target size; `measure`: at any, of degraded images or of images as they are.
    """
    if not decisions.sweep or not measured.main_metric:
        return None
    config, target = spec.evaluation, decisions.sizes.target
    return sweep_sizes(
        clip,
        measure,
        decisions.sweep,
        main_metric=measured.main_metric,
        target=target,
        batch_size=config.batch_size,
        degradations=config.degradations is not False,
        latency_budget_ms=config.latency_budget_ms,
        known={target: measured},
    )


def keep_sweep(
    job: JobFolder, name: str, sweep: ResolutionSweep, step: int, reporter: Reporter
) -> tuple[str, ...]:
    """Writes `resolutions.json` and the picture; returns the picture's path in the job's folder, if there is
    room for it."""
    path = job.pictures / f"resolutions-{step:08d}.png"
    try:
        write_atomically(job.path / "resolutions.json", json.dumps(sweep.to_mapping(), indent=1).encode())
        draw_sweep(sweep, f"{name}, step {step}", path)
    except OSError as error:  # a full disk: the numbers are told all the same
        reporter.notice("picture-failed", f"{path.name} cannot be written: {error.strerror}")
        return ()
    return (path.relative_to(job.path).as_posix(),)
