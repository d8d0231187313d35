"""Line charts as SVG, which a page holds as text: sharp at any size, no library, no file.

Enters: numbers. Leaves: an `<svg>`. Called by `page`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 420
_HEIGHT: Final = 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 26, 34
_TICKS: Final = 5  # at most, and half as many at least
# A page's styles go over these; what reads no styles has them.
_COLOURS: Final = ("#2f6db3", "#c04f37")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points (x, y) of one line; what is no number is left out. `marks`: a dot at each point."""

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def line_chart(title: str, lines: Sequence[Line], x_label: str) -> str:
    """A chart with a scale at each side; "" where there is nothing to draw."""
    kept = [
        Line(
            name=line.name,
            points=[point for point in line.points if all(map(math.isfinite, point))],
            marks=line.marks,
        )
        for line in lines
    ]
    every = [point for line in kept for point in line.points]
    if not every:
        return ""
    x_low, x_high = _span([x for x, _ in every], 0.0)
    y_low, y_high = _span([y for _, y in every], 0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" font-size="11" x="{_LEFT}" y="15">{escape(title)}</text>',
        f'<text class="axis" font-size="10" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">',
        f"{escape(x_label)}</text>",
    ]
    for y in _ticks(y_low, y_high):
        _, up = place(x_low, y)
        parts.append(
            f'<line class="grid" stroke="#d9dee7" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}"'
            f' y1="{up:.1f}" y2="{up:.1f}"/>'
        )
        parts.append(
            f'<text class="axis" font-size="10" x="{_LEFT - 5}" y="{up + 3:.1f}" text-anchor="end">'
            f"{_short(y)}</text>"
        )
    for x in _ticks(x_low, x_high):
        across, _ = place(x, y_low)
        parts.append(
            f'<text class="axis" font-size="10" x="{across:.1f}" y="{_HEIGHT - _BOTTOM + 13}"'
            f' text-anchor="middle">'
            f"{_short(x)}</text>"
        )
    for number, line in enumerate(kept):
        placed = [place(x, y) for x, y in line.points]
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line c{number}" fill="none" stroke="{colour}" points="{path}"/>')
        if line.marks or len(placed) == 1:
            parts += [
                f'<circle class="dot c{number}" fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
                for x, y in placed
            ]
        if len(kept) > 1:
            parts.append(
                f'<text class="key c{number}" font-size="11" fill="{colour}" x="{_WIDTH - _RIGHT}"'
                f' y="{15 + 12 * number}" text-anchor="end">'
                f"{escape(line.name)}</text>"
            )
    return "".join([*parts, "</svg>"])


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high == low:
        size = abs(low) or 1.0
        return low - 0.5 * size, high + 0.5 * size
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, ends included: steps of 1, 2 or 5 of some power of ten."""
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * one for one in (1, 2, 5, 10) if size * one >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000 or 0 < abs(value) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
