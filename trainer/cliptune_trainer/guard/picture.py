"""The guard's curve as a picture: what the domain gained against what general knowledge was paid.

Enters: a `Curve`. Leaves: a PNG file. Called by `guard`. Drawn by matplotlib's Agg without pyplot: no window,
no state that outlives the call.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

from cliptune.durable import write_atomically
from cliptune_trainer.guard.curve import Curve

_DPI: Final = 110


def draw_curve(curve: Curve, title: str, domain_metric: str, general_metric: str, path: Path) -> None:
    """Draws it.

    Raises:
        DiskFullError, OSError: the file cannot be written.
    """
    # Brought in here: it takes most of a second, and only guarded runs that have ended draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    losses = [100 * curve.loss(point) for point in curve.points]
    gains = [100 * curve.gain(point) for point in curve.points]
    axes.plot(losses, gains, color="#3b6ea5", marker="o", markersize=4, linewidth=1.4, zorder=2)
    place = curve.chosen
    axes.plot(losses[place], gains[place], "o", color="#c8553d", markersize=10, zorder=3, label="published")
    tolerance = 100 * curve.tolerance
    axes.axvline(
        tolerance, color="#888888", linestyle="--", linewidth=1, label=f"allowed: {tolerance:g} points"
    )
    for point, loss, gain in zip(curve.points, losses, gains, strict=True):
        axes.annotate(
            f"{point.share:g}", (loss, gain), textcoords="offset points", xytext=(6, -10), fontsize=8
        )
    axes.axhline(0.0, color="#dddddd", linewidth=0.8, zorder=1)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(f"general loss in points\n{general_metric}", parse_math=False)
    axes.set_ylabel(f"domain gain in points\n{domain_metric}", parse_math=False)
    axes.legend(loc="best", fontsize=8, frameon=False)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, format="png")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, file.getvalue())
