"""An evaluation for people: metrics with their intervals, and the table of classes.

Enters: an `Evaluation`. Leaves: rows of text. Called by what prints events and jobs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from cliptune.evaluation import Evaluation
from cliptune.sweep import SWEEP_HEAD, sweep_rows, sweep_summary

METRIC_HEAD: Final = ("METRIC", "VALUE", "95 % INTERVAL")
CLASS_HEAD: Final = ("CLASS", "IMAGES", "PRECISION", "RECALL", "AUROC", "AVERAGE PRECISION")
# A longer table is no line of a log any more; `cliptune jobs show` prints it whole.
_CLASSES_IN_LINES: Final = 30
_LABEL_CHARS: Final = 40


def metric_rows(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Names and values as text, by name; "recall@5" before "recall@10"."""
    return [(name, f"{metrics[name]:.4f}") for name in _in_order(metrics)]


def interval_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Name, value and interval; the main metric first, with a star."""
    names = _in_order(evaluation.metrics)
    names.sort(key=lambda name: name != evaluation.main_metric)
    rows = []
    for name in names:
        interval = evaluation.intervals.get(name)
        told = f"{interval.low:.4f} to {interval.high:.4f}" if interval else ""
        star = " *" if name == evaluation.main_metric else ""
        rows.append((name + star, f"{evaluation.metrics[name]:.4f}", told))
    return rows


def class_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """A row for each class under `CLASS_HEAD`; "-" for what cannot be judged."""
    return [
        (
            entry.label if len(entry.label) <= _LABEL_CHARS else entry.label[: _LABEL_CHARS - 1] + "…",
            str(entry.samples),
            *(
                "-" if math.isnan(value) else f"{value:.4f}"
                for value in (entry.precision, entry.recall, entry.auroc, entry.average_precision)
            ),
        )
        for entry in evaluation.classes
    ]


def general_lines(evaluation: Evaluation) -> list[str]:
    """What the model still knows beside the domain, and which weights are published; none without a guard."""
    lines = []
    if (general := evaluation.general) is not None:
        value, lost = general.metrics[general.main_metric], 100 * general.loss
        where = "below" if lost >= 0 else "above"
        lines.append(f"general: {general.main_metric} {value:.4f}, {abs(lost):.2f} points {where} the start")
    if evaluation.guard is not None:
        lines.append(f"published: {evaluation.guard.reason}")
    return lines


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Of an event: the metrics in one line, and after training or on command a line for each class."""
    told = []
    for name, value, interval in interval_rows(evaluation):
        told.append(f"{name.removesuffix(' *')} {value}" + (f" ({interval})" if interval else ""))
    lines = [f"evaluation ({evaluation.occasion}) at step {evaluation.step}: {'  '.join(told)}"]
    lines += [f"  {line}" for line in general_lines(evaluation)]
    if evaluation.occasion in ("after", "requested"):
        rows = class_rows(evaluation)
        if rows and len(rows) <= _CLASSES_IN_LINES:
            lines += [f"  {line}" for line in _columns([CLASS_HEAD, *rows])]
        if evaluation.sweep is not None:
            rows = [SWEEP_HEAD, *sweep_rows(evaluation.sweep)]
            lines += [f"  {line.rstrip()}" for line in _columns(rows)]
            lines.append(f"  {sweep_summary(evaluation.sweep)}")
        lines += [f"  {path}" for path in evaluation.pictures]
    return lines


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def _in_order(names: Iterable[str]) -> list[str]:
    def order(name: str) -> list[tuple[str, int]]:
        return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D+)(\d*)", name)]

    return sorted(names, key=order)
