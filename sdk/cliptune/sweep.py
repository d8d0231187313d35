"""A model over image sizes: what it can do at each, and what that costs.

Made by the trainer and by `cliptune eval`; part of an `Evaluation`. Both ends use these dataclasses; the
message is `job.proto`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from cliptune.v1 import job_pb2

SWEEP_HEAD: Final = ("SIZE", "METRIC", "IMAGES/S", "LATENCY", "MEMORY", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeResult:
    """A model at one image size. `memory_bytes`: weights, and the tensors of a batch at their peak."""

    height: int
    width: int
    metrics: dict[str, float]
    images_per_second: float
    """Through the image tower, `batch_size` at once."""
    batch_size: int
    latency_ms: float
    """Of one image through the image tower."""
    memory_bytes: int

    @property
    def told(self) -> str:
        """ "224", or "224x320"."""
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionSweep:
    """A model over image sizes, the smallest first."""

    main_metric: str
    sizes: tuple[SizeResult, ...]
    latency_budget_ms: float = 0.0
    """0: none was given."""
    degradations: dict[str, float] = field(default_factory=dict)
    """The main metric at the target size with degraded images."""

    def value(self, size: SizeResult) -> float:
        """The main metric at a size; NaN where it could not be measured."""
        return size.metrics.get(self.main_metric, math.nan)

    @property
    def area_under_curve(self) -> float:
        """Mean height of the main metric's curve over the sides, by trapezoids; NaN without sizes."""
        sides = [math.sqrt(size.height * size.width) for size in self.sizes]
        values = [self.value(size) for size in self.sizes]
        if len(sides) < 2:
            return values[0] if values else math.nan
        area = sum(
            (after - before) * (left + right) / 2
            for before, after, left, right in zip(sides, sides[1:], values, values[1:], strict=False)
        )
        return area / (sides[-1] - sides[0])

    @property
    def worst(self) -> SizeResult | None:
        """The size with the lowest main metric."""
        return min(self._known, key=self.value, default=None)

    @property
    def best(self) -> SizeResult | None:
        """The size with the best main metric that keeps to the latency budget; of equals the quickest."""
        budget = self.latency_budget_ms or math.inf
        possible = [size for size in self._known if size.latency_ms <= budget]
        return max(possible, key=lambda size: (self.value(size), -size.latency_ms), default=None)

    @property
    def _known(self) -> list[SizeResult]:
        return [size for size in self.sizes if not math.isnan(self.value(size))]

    def to_message(self) -> job_pb2.ResolutionSweep:
        """As an event carries it."""
        worst, best = self.worst, self.best
        return job_pb2.ResolutionSweep(
            sizes=[job_pb2.SizeResult(**asdict(size)) for size in self.sizes],
            area_under_curve=self.area_under_curve,
            worst_size=worst.height if worst else 0,
            best_size=best.height if best else 0,
            latency_budget_ms=self.latency_budget_ms,
            degradations=self.degradations,
        )

    def to_mapping(self) -> dict[str, Any]:
        """JSON values, what follows from the sizes included."""
        worst, best = self.worst, self.best
        return {
            **asdict(self),
            "area_under_curve": self.area_under_curve,
            "worst_size": worst.told if worst else None,
            "best_size": best.told if best else None,
        }


def sweep_from_message(message: job_pb2.ResolutionSweep, main_metric: str) -> ResolutionSweep:
    """The view of a `ResolutionSweep`."""
    return ResolutionSweep(
        main_metric=main_metric,
        sizes=tuple(
            SizeResult(
                height=size.height,
                width=size.width,
                metrics=dict(size.metrics),
                images_per_second=size.images_per_second,
                batch_size=size.batch_size,
                latency_ms=size.latency_ms,
                memory_bytes=size.memory_bytes,
            )
            for size in message.sizes
        ),
        latency_budget_ms=message.latency_budget_ms,
        degradations=dict(message.degradations),
    )


def sweep_rows(sweep: ResolutionSweep) -> list[tuple[str, ...]]:
    """A row for each size under `SWEEP_HEAD`, with what is special about it."""
    rows: list[tuple[str, ...]] = []
    for size in sweep.sizes:
        marks = [name for name, one in (("best", sweep.best), ("worst", sweep.worst)) if one is size]
        rows.append(
            (
                size.told,
                f"{sweep.value(size):.4f}",
                f"{size.images_per_second:,.0f}",
                f"{size.latency_ms:.1f} ms",
                f"{size.memory_bytes / 2**20:,.0f} MiB",
                ", ".join(marks),
            )
        )
    return rows


def sweep_summary(sweep: ResolutionSweep) -> str:
    """The figures over all sizes, in one line."""
    parts = [f"mean over sizes {sweep.area_under_curve:.4f}"]
    if sweep.worst:
        parts.append(f"worst {sweep.value(sweep.worst):.4f} at {sweep.worst.told}")
    if sweep.latency_budget_ms:
        within = f"within {sweep.latency_budget_ms:g} ms"
        parts.append(f"best {within}: {sweep.best.told}" if sweep.best else f"no size {within}")
    parts += [f"{name} {value:.4f}" for name, value in _sorted(sweep.degradations)]
    return ", ".join(parts)


def _sorted(values: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items())
