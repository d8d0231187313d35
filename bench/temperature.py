"""A temperature learned in the run beside the best of five fixed ones: quality, and what it costs.

    python -m bench.temperature --data FOLDER --device cuda --parallel 4

Everything else is the domain's recipe (see `bench.domains` for the sets and the figures). The grid are fixed
logit scales, 1 / temperature, a factor of 2 apart up to CLIP's cap of 100. Of the five, "by validation" is
the one that a user would take, seed by seed; "on test" the one that came out best, which nobody can know
beforehand. `global` is the robust form of InfoNCE with FastCLIP's learned temperature. The cost is that of a
step, measured in turns, one run at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
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
    train,
)
from bench.turns import medians

NAME: Final = "temperature"
GRID: Final = (6.25, 12.5, 25.0, 50.0, 100.0)
LEARNED: Final = "learned"
GLOBAL: Final = "global"
_REPETITIONS: Final = 2


def fixed(scale: float) -> str:
    """Name of a run whose logit scale stays."""
    return f"fixed at {scale:g}"


ARMS: Final[Mapping[str, Mapping[str, Any]]] = {
    LEARNED: {},
    GLOBAL: {"loss": {"name": "infonce", "temperature": "global"}},
    **{fixed(scale): {"loss": {"temperature": "fixed", "logit_scale": scale}} for scale in GRID},
}
FIXED: Final = tuple(fixed(scale) for scale in GRID)


def work(subject: DomainSet, arm: str, common: Mapping[str, Any], device: str) -> Work:
    """A run: the domain's recipe, with this temperature."""
    return Work(
        subject=subject,
        arm=arm,
        spec=merged(common, {"domain": subject.about.domain}, ARMS[arm]),
        device=device,
    )


def value(one: Judged, subject: DomainSet) -> float:
    """The domain's metric on the test split, by the recipe's prompts."""
    return one.test[subject.about.questions[0].column, RECIPE][recipe_metric(subject)]


def lines_of(subject: DomainSet, found: Sequence[Judged]) -> list[Columns]:
    """A line for each temperature and for the two ways to choose of the grid."""
    by_arm = {arm: [one for one in found if one.arm == arm] for arm in ARMS}
    by_arm = {arm: runs for arm, runs in by_arm.items() if runs}
    seeds = sorted({one.seed for one in found})
    grids = {seed: [one for one in found if one.seed == seed and one.arm in FIXED] for seed in seeds}
    whole = {seed: grid for seed, grid in grids.items() if len(grid) == len(GRID)}
    chosen = {seed: max(grid, key=lambda one: one.validation) for seed, grid in whole.items()}
    sides: dict[str, list[Judged]] = dict(by_arm)
    if whole:
        sides["best of five, by validation"] = list(chosen.values())
        best = max(FIXED, key=lambda arm: fmean(value(one, subject) for one in by_arm[arm]))
        sides["best of five, on test"] = by_arm[best]
    lines: list[Columns] = []
    for side, runs in sides.items():
        scales = sorted(one.logit_scale for one in runs)
        ours = {one.seed: value(one, subject) for one in by_arm.get(LEARNED, [])}
        more = [ours[one.seed] - value(one, subject) for one in runs if one.seed in ours]
        lines.append(
            {
                "set": subject.name,
                "metric": recipe_metric(subject).partition("/")[2].replace("_", " "),
                "temperature": side,
                "seeds": len(runs),
                "logit scale at the end": f"{scales[0]:.3g} to {scales[-1]:.3g}",
                "test": plus_minus([value(one, subject) for one in runs]),
                "validation": plus_minus([one.validation for one in runs]),
                "learned is more by": "–" if side == LEARNED or not more else plus_minus(more),
            }
        )
    return lines


def costs(subject: DomainSet, common: Mapping[str, Any], device: str) -> list[Columns]:
    """A step's time with a learned and with a fixed temperature, in turns, the first round not counted."""
    arms = (LEARNED, GLOBAL, fixed(GRID[2]))
    steps = medians({arm: partial(_step_s, work(subject, arm, common, device)) for arm in arms}, _REPETITIONS)
    peer = steps[fixed(GRID[2])]
    lines: list[Columns] = [
        {"temperature": arm, "ms a step": round(1e3 * step_s, 2), "cost of one run": round(step_s / peer, 3)}
        for arm, step_s in steps.items()
    ]
    return [
        *lines,
        {"temperature": "a grid of five", "ms a step": round(1e3 * peer, 2), "cost of one run": len(GRID)},
    ]


def _step_s(one: Work) -> float:
    return train(one).step_s


def main() -> None:
    """Entry point."""
    given = arguments_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as home:
        subjects = [lay_ready(name, given.data, Path(home), rows=given.rows) for name in given.sets]
        commons = [
            budget(given.model, given.device, epochs=given.epochs, seed=seed) for seed in range(given.seeds)
        ]
        cost = costs(subjects[0], commons[0], given.device)
        wanted = [
            work(subject, arm, common, given.device)
            for common in commons
            for subject in subjects
            for arm in ARMS
        ]
        found: list[Judged] = []
        for one in all_trained(wanted, given.parallel):
            found.append(one)
            lines = [
                line
                for subject in subjects
                for line in lines_of(subject, [other for other in found if other.subject == subject.name])
            ]
            result = Result.of(
                NAME, lines, device=device_name(given.device), more={f"Cost, {subjects[0].name}": cost}
            )
            if not given.rows:
                result.store()
            print(f"{one.subject}, {one.arm}, seed {one.seed}: {one.train_s:.1f} s", flush=True)
        print(tables(result))


if __name__ == "__main__":
    main()
