"""A sweep over image sizes as a picture: the metric and the speed by size.

Enters: a `ResolutionSweep`. Leaves: a PNG file. Called after training and by `cliptune eval`.
"""

from __future__ import annotations

import io
from itertools import cycle
from pathlib import Path
from typing import Final

from cliptune.durable import write_atomically
from cliptune.sweep import ResolutionSweep
from cliptune_trainer.evaluation.sweep import sides

_DPI: Final = 110
_DASHES: Final = (":", "-.", (0, (5, 3)), (0, (1, 4)))


def draw_sweep(sweep: ResolutionSweep, title: str, path: Path) -> None:
    """Draws it.

    Raises:
        DiskFullError, OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _png(sweep, title))


def _png(sweep: ResolutionSweep, title: str) -> bytes:
    # Brought in here: it takes most of a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    pixels = sides(sweep.sizes)
    axes.plot(pixels, [sweep.value(size) for size in sweep.sizes], "o-", color="tab:blue")
    for (name, value), dashes in zip(sorted(sweep.degradations.items()), cycle(_DASHES), strict=False):
        label = f"{name.replace('_', ' ')}: {value:.3f}"
        axes.axhline(value, linestyle=dashes, linewidth=0.9, color="tab:grey", label=label)
    if sweep.best is not None:
        (best,) = sides([sweep.best])
        label = f"best: {sweep.best.told}"
        axes.axvline(best, linestyle="--", linewidth=0.9, color="tab:green", label=label)
    if axes.get_legend_handles_labels()[1]:
        # Under the picture: lines at any height leave no corner free.
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.set_xticks(pixels, [size.told for size in sweep.sizes])
    axes.set_xlabel("image size in pixels")
    axes.set_ylabel(sweep.main_metric, color="tab:blue")
    axes.set_title(title, parse_math=False)
    speeds = [size.images_per_second for size in sweep.sizes]
    speed = axes.twinx()
    speed.plot(pixels, speeds, "s--", color="tab:orange", markersize=4)
    speed.set_ylabel("images a second", color="tab:orange")
    speed.set_ylim(bottom=0)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, format="png")
    return file.getvalue()
