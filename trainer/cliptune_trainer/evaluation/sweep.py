"""A model measured over image sizes.

Enters: a `Clip`, what measures it, and the sizes. Leaves: a `ResolutionSweep`. Called after training and by
`cliptune eval`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from cliptune.sweep import ResolutionSweep, SizeResult
from cliptune_model.clip import Clip
from cliptune_model.proven_sizes import ProvenSize, Size
from cliptune_trainer.evaluation.degrade import DEGRADATIONS, Degrade
from cliptune_trainer.evaluation.embedding import evaluation_mode
from cliptune_trainer.evaluation.measurement import Measurement
from cliptune_trainer.evaluation.speed import measure_speed

Measure = Callable[[Clip, Degrade | None], Measurement]
"""Of the model at its size, with degraded images or as they are; may raise `EvaluationInterrupted`."""


def sweep_sizes(
    clip: Clip,
    measure: Measure,
    sizes: Iterable[Size],
    *,
    main_metric: str,
    target: Size,
    batch_size: int,
    degradations: bool = True,
    latency_budget_ms: float = 0.0,
    known: Mapping[Size, Measurement] | None = None,
) -> ResolutionSweep:
    """Metric, speed and memory at each size, and the metric under degradations at the target.

    Args:
        clip: the model.
        measure: its metrics.
        sizes: (height, width) each.
        main_metric: the one that sizes are compared by.
        target: the size that images are degraded at.
        batch_size: images at once, for their speed.
        degradations: measure these too.
        latency_budget_ms: 0: none.
        known: what was measured already.
    """
    found: list[SizeResult] = []
    for size in sorted(set(sizes), key=lambda size: (size[0] * size[1], size)):
        at_size = clip.at(size)
        measured = (known or {}).get(size) or measure(at_size, None)
        with evaluation_mode(clip.model):
            speed = measure_speed(at_size, batch_size)
        found.append(
            SizeResult(
                height=size[0],
                width=size[1],
                metrics=measured.metrics,
                images_per_second=speed.images_per_second,
                batch_size=speed.batch_size,
                latency_ms=speed.latency_ms,
                memory_bytes=speed.memory_bytes,
            )
        )
    degraded = {
        name: measure(clip.at(target), degrade).metrics.get(main_metric, math.nan)
        for name, degrade in (DEGRADATIONS.items() if degradations else ())
    }
    return ResolutionSweep(
        main_metric=main_metric,
        sizes=tuple(found),
        latency_budget_ms=latency_budget_ms,
        degradations={name: value for name, value in degraded.items() if not math.isnan(value)},
    )


def proven_sizes(sweep: ResolutionSweep) -> tuple[ProvenSize, ...]:
    """What a manifest keeps of a sweep: sizes whose metric could be told."""
    return tuple(
        ProvenSize(
            height=size.height,
            width=size.width,
            value=sweep.value(size),
            images_per_second=size.images_per_second,
            latency_ms=size.latency_ms,
            memory_bytes=size.memory_bytes,
        )
        for size in sweep.sizes
        if not math.isnan(sweep.value(size))
    )


def sides(sizes: Sequence[SizeResult]) -> list[float]:
    """Sides in pixels, for an axis; of images that are not square the geometric mean of both."""
    return [math.sqrt(size.height * size.width) for size in sizes]
