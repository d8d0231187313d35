"""A study's trials as the user sees them, in the form of `job.proto` and as lines.

Made by `job.py`; part of a `Job`, and the body of a `JobEvent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cliptune.errors import CliptuneError, from_detail
from cliptune.v1 import job_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialDone:
    """A trial of a study has ended. `outcome`: "complete", "pruned", "cancelled" or "failed"."""

    number: int
    """From 0."""
    job_id: str
    """The job that ran it. Empty: it could not be submitted."""
    settings: dict[str, str]
    """What it tried, by path."""
    outcome: str
    value: float | None
    """The metric; of a trial that did not come to its end the last one seen."""
    best: bool
    """It was the best so far."""
    error: CliptuneError | None


def trial_from_message(message: job_pb2.TrialDone) -> TrialDone:
    """The view of a `TrialDone`."""
    return TrialDone(
        number=message.number,
        job_id=message.job_id,
        settings=dict(message.settings),
        outcome=message.outcome,
        value=message.value if message.HasField("value") else None,
        best=message.best,
        error=from_detail(message.error) if message.HasField("error") else None,
    )


def trial_lines(trial: TrialDone) -> list[str]:
    """One line, and one more for an error."""
    value = "" if trial.value is None else f" {trial.value:.4f}"
    settings = " ".join(f"{path}={_short(text)}" for path, text in sorted(trial.settings.items()))
    lines = [f"trial {trial.number} {trial.outcome}{value} {settings}{' (best)' * trial.best}"]
    if trial.error is not None:
        lines.append(f"{type(trial.error).__name__}: {trial.error.message}")
    return lines


TRIAL_HEAD: Final = ("TRIAL", "OUTCOME", "VALUE", "SETTINGS", "JOB")


def trial_rows(trials: Sequence[TrialDone]) -> list[tuple[str, ...]]:
    """For a table under `TRIAL_HEAD`; the best is marked with a star. In the order of their ends."""
    best = next((trial.number for trial in reversed(trials) if trial.best), None)
    return [
        (
            f"{trial.number}{'*' if trial.number == best else ''}",
            trial.outcome,
            "-" if trial.value is None else f"{trial.value:.4f}",
            " ".join(f"{path}={_short(text)}" for path, text in sorted(trial.settings.items())),
            trial.job_id or "-",
        )
        for trial in trials
    ]


def _short(text: str) -> str:
    """Numbers to four digits, other values as they are."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
