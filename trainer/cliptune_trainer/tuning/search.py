"""What was tried, what came of it, and what to try next: Optuna's study in a file of the job's folder.

Enters: the space, and the metric of each trial as it goes. Leaves: settings to try, whether a trial is worth
going on, the best. Called by the runner alone, from one thread. All of it is on disk before it is told, so a
study that is taken up again knows every trial, those that were under way among them.

Sampling: the tree-structured Parzen estimator (Bergstra et al. 2011; Optuna's, over all settings together).
Ending early: Hyperband (Li et al. 2018), a resource being an evaluation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import optuna
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from cliptune_trainer.spec.tune import Dimension, TuneConfig

COMPLETE: Final = "complete"
PRUNED: Final = "pruned"
CANCELLED: Final = "cancelled"
FAILED: Final = "failed"
_NAME: Final = "study"
# Drawn at random before the estimator has something to go by.
_MOST_RANDOM: Final = 10
_LEAST_RANDOM: Final = 4
_SETTINGS: Final = "settings"
_JOB: Final = "job_id"
_SECONDS: Final = "seconds"
_OUTCOME: Final = "outcome"
_METRIC: Final = "metric"
_STATES: Final = {
    COMPLETE: TrialState.COMPLETE,
    PRUNED: TrialState.PRUNED,
    CANCELLED: TrialState.FAIL,
    FAILED: TrialState.FAIL,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A trial. `settings`: by path, as in "PATH=VALUE"; `value`: the metric, None where there is none."""

    number: int
    settings: dict[str, str]
    job_id: str
    outcome: str
    value: float | None
    seconds: float


class Search:
    """The study of one job.

    Args:
        path: of its SQLite file, which is made if it is missing.
        config: how to search.
        dimensions: what varies.
        evaluations: of one trial, the most there can be.
    """

    def __init__(
        self, path: Path, config: TuneConfig, dimensions: Sequence[Dimension], evaluations: int
    ) -> None:
        self._dimensions = {dimension.path: dimension for dimension in dimensions}
        path.parent.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is experimental there, and of what SQLAlchemy does
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            self._study = optuna.create_study(
                storage=storage,
                study_name=_NAME,
                direction="minimize" if config.minimize else "maximize",
                sampler=None,
                pruner=optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(evaluations, 1)),
                load_if_exists=True,
            )
            past = len(self._study.get_trials(deepcopy=False))
            random = max(_LEAST_RANDOM, min(_MOST_RANDOM, (config.max_trials or 3 * _MOST_RANDOM) // 3))
            # The sampler's own state is not kept: another seed, or a study taken up again would draw the
            # first trials' settings once more.
            self._study.sampler = TPESampler(
                seed=(config.seed + past) % 2**32, n_startup_trials=random, multivariate=True
            )
        if not past and (start := self._start()):
            self._study.enqueue_trial(start)

    @property
    def spent_s(self) -> float:
        """Wall-clock seconds that earlier attempts took."""
        return float(self._study.user_attrs.get(_SECONDS, 0.0))

    @spent_s.setter
    def spent_s(self, seconds: float) -> None:
        self._study.set_user_attr(_SECONDS, seconds)

    @property
    def metric(self) -> str:
        """Name of what trials are compared by; empty before the first was measured."""
        return str(self._study.user_attrs.get(_METRIC, ""))

    @metric.setter
    def metric(self, name: str) -> None:
        if name != self.metric:
            self._study.set_user_attr(_METRIC, name)

    @property
    def count(self) -> int:
        """Trials begun so far."""
        return sum(trial.state != TrialState.WAITING for trial in self._study.get_trials(deepcopy=False))

    def under_way(self) -> list[Trial]:
        """Trials that have not been told an outcome: of an attempt that was broken off."""
        found = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [Trial(self._study, trial._trial_id) for trial in found]

    def ask(self) -> Trial:
        """A new trial."""
        return self._study.ask()

    def settings(self, trial: Trial) -> dict[str, str]:
        """What the trial tries. The same at every call."""
        drawn = {path: _drawn(trial, dimension) for path, dimension in self._dimensions.items()}
        trial.set_user_attr(_SETTINGS, drawn)
        return drawn

    def remember_job(self, trial: Trial, job_id: str) -> None:
        """Which job runs it."""
        trial.set_user_attr(_JOB, job_id)

    def worth_going_on(self, trial: Trial, evaluation: int, value: float) -> bool:
        """Whether a trial with this metric at its n-th evaluation, from 1 on, should go on."""
        trial.report(value, evaluation)
        return not trial.should_prune()

    def tell(self, trial: Trial, outcome: str, value: float | None, seconds: float) -> bool:
        """A trial has ended; returns whether it is the best so far."""
        trial.set_user_attr(_OUTCOME, outcome)
        trial.set_user_attr(_SECONDS, seconds)
        values = [value] if outcome == COMPLETE and value is not None else None
        self._study.tell(trial, values, state=_STATES[outcome])
        best = self.best()
        return best is not None and best.number == trial.number

    def best(self) -> Tried | None:
        """The best of the trials that came to their end."""
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return _tried(self._study.best_trial) if complete else None

    def tried(self) -> list[Tried]:
        """All that have ended, in the order of their numbers."""
        return [
            _tried(trial) for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()
        ]

    @property
    def study(self) -> optuna.Study:
        """For the plots."""
        return self._study

    def _start(self) -> dict[str, object]:
        return {
            path: _parsed(dimension, dimension.start)
            for path, dimension in self._dimensions.items()
            if dimension.start
        }


def _drawn(trial: Trial, dimension: Dimension) -> str:
    if dimension.values:
        return str(trial.suggest_categorical(dimension.path, dimension.values))
    if dimension.integer:
        low, high = int(dimension.low), int(dimension.high)
        return str(trial.suggest_int(dimension.path, low, high, log=dimension.log))
    return repr(trial.suggest_float(dimension.path, dimension.low, dimension.high, log=dimension.log))


def _parsed(dimension: Dimension, text: str) -> object:
    if dimension.values:
        return text
    return int(json.loads(text)) if dimension.integer else float(text)


def _tried(trial: FrozenTrial) -> Tried:
    attrs = trial.user_attrs
    last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
    return Tried(
        number=trial.number,
        settings=dict(attrs.get(_SETTINGS, {})),
        job_id=str(attrs.get(_JOB, "")),
        outcome=str(attrs.get(_OUTCOME, FAILED)),
        value=trial.value if trial.state == TrialState.COMPLETE else last,
        seconds=float(attrs.get(_SECONDS, 0.0)),
    )
