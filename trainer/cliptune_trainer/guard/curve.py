"""Which point between the starting and the trained weights is published.

Enters: points with what the domain gained and general knowledge lost at each. Leaves: a `Curve` with the
chosen one and why. Called by `guard`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cliptune.v1 import job_pb2

# Differences below are noise of the last digits, not gain or loss.
_SAME = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One model: a share of the way, and the main metrics of domain and probe."""

    share: float
    domain: float
    general: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Points by share, the starting model first, and which was chosen."""

    points: tuple[Point, ...]
    chosen: int
    tolerance: float
    reason: str

    @property
    def share(self) -> float:
        """Of the chosen point."""
        return self.points[self.chosen].share

    def gain(self, point: Point) -> float:
        """Of the domain's metric over the starting model's."""
        return point.domain - self.points[0].domain

    def loss(self, point: Point) -> float:
        """Of the probe's metric against the starting model's."""
        return self.points[0].general - point.general

    def told(self, *, picture: str, ema_decay: float) -> job_pb2.GuardCurve:
        """As part of an event."""
        points = [
            job_pb2.GuardPoint(
                share=point.share,
                domain=point.domain,
                domain_gain=self.gain(point),
                general=point.general,
                general_loss=self.loss(point),
            )
            for point in self.points
        ]
        return job_pb2.GuardCurve(
            points=points,
            chosen=self.chosen,
            tolerance=self.tolerance,
            reason=self.reason,
            picture=picture,
            ema_decay=ema_decay,
        )


def choose(points: Sequence[Point], tolerance: float) -> Curve:
    """The best for the domain of the points that lose no more than the tolerance; of equals the one that
    loses less, then the nearer to the start.

    Args:
        points: by share; the first is the starting model, which loses nothing, the last the trained one.
        tolerance: of the probe's metric.
    """
    start, trained = points[0], points[-1]

    def loss(point: Point) -> float:
        return start.general - point.general

    allowed = [place for place, point in enumerate(points) if loss(point) <= tolerance + _SAME]
    chosen = max(
        allowed,
        key=lambda place: (
            _rounded(points[place].domain),
            -_rounded(loss(points[place])),
            -points[place].share,
        ),
    )
    point, paid = points[chosen], loss(points[chosen])
    price = (
        f"at a general loss of {paid:.4f} of {tolerance:g} allowed"
        if paid > _SAME
        else "without a general loss"
    )
    if chosen == 0:
        least = min((loss(other), other.share) for other in points[1:])
        why = (
            f"every other point loses more than {tolerance:g}: the least is {least[0]:.4f}, at {least[1]:g}"
            if len(allowed) == 1
            else "no point that loses so little is better for the domain"
        )
        reason = f"the starting weights: {why}"
    elif chosen == len(points) - 1:
        reason = f"the trained weights: the domain's best, {price}"
    else:
        kept = ""
        if (whole := trained.domain - start.domain) > _SAME:
            kept = f", keeping {(point.domain - start.domain) / whole:.0%} of the domain's gain"
        reason = f"{point.share:g} of the way: the domain's best {price}{kept}"
    return Curve(points=tuple(points), chosen=chosen, tolerance=tolerance, reason=reason)


def _rounded(value: float) -> float:
    return round(value, 9)
