"""Line charts as SVG, without a library: panels beside each other, x in powers of two.

Enters: named lines. Leaves: the text of an SVG file. Called by benchmarks whose figures are shown in docs/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _TOP, _LEFT, _BOTTOM, _RIGHT = 430, 316, 76, 60, 48, 16
# Told apart without colour too: the second is dashed.
_STROKES: Final = (("#1f6feb", ""), ("#d1242f", "6 4"), ("#1a7f37", "2 3"), ("#8250df", "8 3 2 3"))
_Y_TICKS: Final = 5
# The names of the lines, in a row above the axes, where no line passes.
_KEY_Y, _KEY_WIDTH = 60, 150


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points in the order of x, all above 0."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """The SVG, with a white background so that it is read on dark pages too."""
    width = _WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{width / 2:g}" y="20" text-anchor="middle" font-size="14">{escape(title)}</text>',
    ]
    for place, panel in enumerate(panels):
        parts += [f'<g transform="translate({place * _WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    if not points:
        return []
    low, high = math.log2(min(x for x, _ in points)), math.log2(max(x for x, _ in points))
    step = _round_step(max(y for _, y in points) / _Y_TICKS)
    top = step * math.ceil(max(y for _, y in points) / step)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / max(high - low, 1e-9)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [f'<text x="{_LEFT}" y="44">{escape(panel.title)}, {escape(panel.y)}</text>']
    for tick in range(round(top / step) + 1):
        _, y = at(2**low, tick * step)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick * step:g}</text>')
    for x in sorted({x for x, _ in points}):
        across, bottom = at(x, 0)
        parts.append(f'<text x="{across}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(panel.x)}</text>')
    for place, line in enumerate(panel.lines):
        colour, dashes = _STROKES[place % len(_STROKES)]
        path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in line.points))
        style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{path}" fill="none" {style}/>')
        x = _LEFT + _KEY_WIDTH * place
        parts.append(
            f'<line x1="{x}" x2="{x + 24}" y1="{_KEY_Y}" y2="{_KEY_Y}" {style}/>'
            f'<text x="{x + 30}" y="{_KEY_Y + 4}">{escape(line.name)}</text>'
        )
    return parts


def _round_step(least: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
