"""The confusion matrix as a picture.

Enters: a measurement. Leaves: a PNG file. Called by the loop after training and on command. Drawn by
matplotlib's Agg without pyplot: no window, no state that outlives the call.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from cliptune.durable import write_atomically
from cliptune_trainer.evaluation.measurement import Measurement
from cliptune_trainer.evaluation.metrics import Integers

if TYPE_CHECKING:
    from matplotlib.axis import Axis

# Beyond these, numbers in the cells, names at the edges and at last the picture itself cannot be read.
_NUMBERED: Final = 24
_NAMED: Final = 60
MOST_CLASSES: Final = 200
_LABEL_CHARS: Final = 28
_SHORT: Final = 9
_DPI: Final = 110


def draw_confusion(measured: Measurement, title: str, path: Path) -> bool:
    """Draws counts and the share of each true class; False where there is nothing to draw.

    Raises:
        DiskFullError, OSError: the file cannot be written.
    """
    if not 0 < len(measured.confusion) <= MOST_CLASSES:
        return False
    path.parent.mkdir(exist_ok=True)
    labels = [entry.label for entry in measured.classes]
    write_atomically(path, _png(np.array(measured.confusion, dtype=np.int64), labels, title))
    return True


def _png(counts_CC: Integers, labels: Sequence[str], title: str) -> bytes:
    # Brought in here: it takes most of a second, and only runs with labels that have ended draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = len(labels)
    shares_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    side = min(3.5 + 0.42 * classes, 16.0)
    figure = Figure(figsize=(side + 0.8, side), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares_CC, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    if classes <= _NAMED:
        for axis in (axes.xaxis, axes.yaxis):
            _name(axis, labels)
        # Beside each other they have half an inch each, or little more.
        crowded = classes > 4 or max(map(len, labels)) > _SHORT
        axes.tick_params(axis="x", labelrotation=90 if crowded else 0)
    if classes <= _NUMBERED:
        for row, column in np.ndindex(counts_CC.shape):
            if count := int(counts_CC[row, column]):
                colour = "white" if shares_CC[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        FigureCanvasAgg(figure).print_figure(file, format="png")
    return file.getvalue()


def _name(axis: Axis, labels: Sequence[str]) -> None:
    axis.set_ticks(range(len(labels)))
    shown = [label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…" for label in labels]
    # A label's "$" is no mathematics.
    axis.set_ticklabels(shown, parse_math=False)
