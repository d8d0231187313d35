"""What a study may vary, and for how long: the spec's `[tune]`, typed and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cliptune.v1 import spec_pb2
from cliptune_trainer.spec.check import within, wrong

DEFAULT_TRIALS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One setting that varies: from `low` to `high`, or one of `values`.

    Attributes:
        path: as in a spec, "train.learning_rate".
        low, high: both included; without `values`.
        log: even in the logarithm.
        integer: whole numbers only.
        values: each as it would stand in a setting, "PATH=VALUE".
        start: what the first trial takes; "": drawn as the others.
    """

    path: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    values: tuple[str, ...] = ()
    start: str = ""

    def __post_init__(self) -> None:
        here = f"tune.parameters of {self.path!r}"
        if not self.path:
            raise wrong("tune.parameters", "without a path", "a field of the spec, as train.learning_rate")
        if self.values:
            if len(set(self.values)) < max(2, len(self.values)):
                raise wrong(here, f"{list(self.values)}", "two or more values, each once")
            return
        if not self.low < self.high:  # also for NaN
            raise wrong(here, f"{self.low:g} to {self.high:g}", "values, or a range from low up to high")
        if self.log and self.low <= 0:
            raise wrong(here, f"log from {self.low:g}", "a low above 0 where log is set")
        if self.integer and (self.low % 1 or self.high % 1):
            raise wrong(here, f"whole numbers from {self.low:g} to {self.high:g}", "whole bounds")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """A search for better settings.

    Attributes:
        dimensions: what varies; none: chosen from the job.
        max_trials: None: until the budget is spent.
        budget_s: wall-clock seconds; None: no limit.
        metric: "": the main one.
        minimize: less is better.
        parallel: trials at once.
        seed: of what is drawn.
    """

    dimensions: tuple[Dimension, ...] = ()
    max_trials: int | None = None
    budget_s: float | None = None
    metric: str = ""
    minimize: bool = False
    parallel: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_trials is not None:
            within("tune.max_trials", self.max_trials, 1, 100_000)
        if self.budget_s is not None:
            within("tune.budget_seconds", self.budget_s, 1.0, 1e9)
        within("tune.parallel", self.parallel, 1, 64)
        paths = [dimension.path for dimension in self.dimensions]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise wrong("tune.parameters", f"with {twice[0]} twice", "each path once")


def tune_config(message: spec_pb2.TuneSpec) -> TuneConfig:
    """The typed form of `TuneSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    limited = message.HasField("max_trials")
    budget_s = message.budget_seconds if message.HasField("budget_seconds") else 0.0
    if message.HasField("budget_seconds"):
        within("tune.budget_seconds", budget_s, 0.0, 1e9)
    return TuneConfig(
        dimensions=_dimensions(message.parameters),
        max_trials=message.max_trials if limited else None if budget_s else DEFAULT_TRIALS,
        budget_s=budget_s or None,
        metric=message.metric,
        minimize=message.minimize,
        parallel=message.parallel if message.HasField("parallel") else 1,
        seed=message.seed,
    )


def _dimensions(parameters: Sequence[spec_pb2.TuneParameter]) -> tuple[Dimension, ...]:
    return tuple(
        Dimension(
            path=entry.path,
            low=entry.low,
            high=entry.high,
            log=entry.log,
            integer=entry.integer,
            values=tuple(entry.values),
        )
        for entry in parameters
    )
