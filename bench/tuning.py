"""What `cliptune tune` makes of a domain's recipe within a budget: the default beside the best of the study.

    python -m bench.tuning --data FOLDER --device cuda --budget 10m --parallel 3

Each set is searched by a daemon of its own, through the client: a study, its trials ordinary jobs, the first
of them the recipe as it is. Trials are compared on the validation rows alone. The default and the study's
`best.toml` are then trained anew with several seeds and asked about the test split, which no trial saw (see
`bench.domains` for the sets and the figures).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.domain_sets import DomainSet, lay_ready
from bench.record import Columns, Result, tables
from bench.trained import (
    RECIPE,
    Judged,
    Work,
    all_trained,
    arguments_of,
    budget,
    device_name,
    merged,
    plus_minus,
    recipe_metric,
)
from cliptune import Client
from cliptune.cli.tune import seconds_of
from cliptune.job import JobState
from cliptune.spec import load_spec, spec_to_mapping
from cliptune.study import TrialDone
from tests.support.daemon import running_daemon

NAME: Final = "tuning"
DEFAULT: Final = "default"
BEST: Final = "best"


@dataclass(frozen=True, kw_only=True, slots=True)
class Studied:
    """What a study found. `best`: the spec of `best.toml`."""

    subject: DomainSet
    trials: tuple[TrialDone, ...]
    best: Mapping[str, Any]


def study(
    subject: DomainSet, spec: Mapping[str, Any], *, home: Path, device: str, budget_s: float
) -> Studied:
    """Searches through a daemon. Raises RuntimeError when the study ends otherwise than well."""
    roots = (subject.folder, subject.images)
    with running_daemon(home, data_roots=roots, device=device) as daemon, Client(daemon.grpc) as client:
        job = client.create_job(merged(spec, {"tune": {"budget_seconds": budget_s, "seed": 0}}))
        trials = tuple(event.body for event in client.watch_job(job.id) if isinstance(event.body, TrialDone))
        job = client.get_job(job.id)
        if job.state != JobState.SUCCEEDED:
            raise RuntimeError(f"the study of {subject.name} is {job.state}: {job.state_reason}")
        best = load_spec(home / "jobs" / job.id / "study" / "best.toml")
    return Studied(subject=subject, trials=trials, best=spec_to_mapping(best))


def works(found: Studied, spec: Mapping[str, Any], seeds: Sequence[int], device: str) -> list[Work]:
    """The study's spec without its search and its `best.toml`, trained anew with other seeds."""
    return [
        Work(
            subject=found.subject,
            arm=side,
            spec=merged(said, {"train": {"seed": seed}, "evaluation": {"every_epochs": 0}}),
            device=device,
        )
        for seed in seeds
        for side, said in ((DEFAULT, spec), (BEST, found.best))
    ]


def lines_of(found: Studied, runs: Sequence[Judged]) -> list[Columns]:
    """A line each for the default and the best."""
    metric = recipe_metric(found.subject)
    question = found.subject.about.questions[0].column
    tried = {DEFAULT: found.trials[0], BEST: next(trial for trial in reversed(found.trials) if trial.best)}

    def value(one: Judged) -> float:
        return one.test[question, RECIPE][metric]

    def by_seed(side: str) -> dict[int, float]:
        return {one.seed: value(one) for one in runs if one.arm == side}

    defaults, bests = by_seed(DEFAULT), by_seed(BEST)
    more = [bests[seed] - defaults[seed] for seed in defaults.keys() & bests.keys()]
    return [
        {
            "set": found.subject.name,
            "metric": metric.partition("/")[2].replace("_", " "),
            "side": side,
            "trial": f"{trial.number} of {len(found.trials)}",
            "settings": settings_of(trial),
            "validation": plus_minus([trial.value]) if trial.value is not None else "–",
            "seeds": len(by_seed(side)),
            "test": plus_minus(list(by_seed(side).values())) if by_seed(side) else "–",
            "more than the default": plus_minus(more) if side == BEST and more else "–",
        }
        for side, trial in tried.items()
    ]


def settings_of(trial: TrialDone) -> str:
    """ "learning_rate 0.0003, weight_decay 0.1"."""
    return ", ".join(
        f"{path.rpartition('.')[2]} {float(text):.3g}" for path, text in sorted(trial.settings.items())
    )


def trial_lines(found: Studied) -> list[Columns]:
    """Every trial."""
    return [
        {
            "set": found.subject.name,
            "trial": trial.number,
            "outcome": trial.outcome,
            "validation": "–" if trial.value is None else plus_minus([trial.value]),
            "settings": settings_of(trial),
        }
        for trial in found.trials
    ]


def main() -> None:
    """Entry point."""
    parser = arguments_of(__doc__)
    parser.add_argument("--budget", default="10m", help="of each study (default: %(default)s)")
    given = parser.parse_args()
    budget_s = seconds_of(given.budget)
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as folder:
        home = Path(folder)
        subjects = [lay_ready(name, given.data, home / "sets", rows=given.rows) for name in given.sets]
        common = merged(
            budget(given.model, given.device, epochs=given.epochs, seed=0),
            {"evaluation": {"every_epochs": 1}},
        )
        specs = {
            subject.name: merged(subject.spec(), common, {"domain": subject.about.domain})
            for subject in subjects
        }

        def searched(subject: DomainSet) -> Studied:
            return study(
                subject,
                specs[subject.name],
                home=home / f"home-{subject.name}",
                device=given.device,
                budget_s=budget_s,
            )

        with ThreadPoolExecutor(given.parallel) as pool:
            studies = list(pool.map(searched, subjects))
        wanted = [
            work
            for found in studies
            for work in works(found, specs[found.subject.name], range(given.seeds), given.device)
        ]
        wanted.sort(key=lambda work: work.seed)
        runs: list[Judged] = []
        trials = [line for found in studies for line in trial_lines(found)]
        for one in all_trained(wanted, given.parallel):
            runs.append(one)
            lines = [
                line
                for found in studies
                for line in lines_of(found, [other for other in runs if other.subject == found.subject.name])
            ]
            result = Result.of(
                NAME,
                lines,
                device=device_name(given.device),
                more={f"Trials within {budget_s:g} s": trials},
            )
            if not given.rows:
                result.store()
            print(f"{one.subject}, {one.arm}, seed {one.seed}: {one.train_s:.1f} s", flush=True)
        print(tables(result))


if __name__ == "__main__":
    main()
