"""A domain's recipe beside plain InfoNCE with open_clip's defaults: which model is the better one.

    python -m bench.domains --data FOLDER --device cuda --parallel 4

FOLDER holds the tars medical_bccd and scientific_nuclei; solar cells come from the package elpv-dataset.
Every run starts from the same model and sees the same rows, captions, batches and epochs; images of the test
split, which neither training nor a choice saw, are asked the same questions in the same words. A seed sets
order and augmentation. Figures are the metric that the domain's recipe says counts, in percent: mean over
seeds and how far the 95 % interval (Student's t) reaches; "more than the peer" is of the runs in pairs, seed
by seed.

Sides: `recipe` is what a user gets who names the domain and nothing else. `open_clip` is what open_clip_train
does unless told otherwise: AdamW at 5e-4 with decay 0.2, betas 0.9 and 0.98, no clipping, crops of 90 % and
more, and a warm-up of 10,000 steps, which runs as short as these never leave. `open_clip, warmed up` has the
same rate with a warm-up of a tenth of the run. `recipe, InfoNCE` is the recipe with that loss; `InfoNCE` the
defaults of a spec without a domain: they tell apart what the loss, the changes to images and the rate bring.
What prompts bring is told by asking each model twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.domain_sets import DomainSet, lay_ready
from bench.record import Columns, Result, stored_results, tables
from bench.trained import (
    PLAIN,
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
    starting_point,
)

NAME: Final = "domains"
OURS: Final = "recipe"
PEER: Final = "open_clip"
START: Final = "start"
# open_clip_train 3.3, params.py, and the transforms of its training.
OPEN_CLIP_RATE: Final = 5e-4
OPEN_CLIP_WARMUP_STEPS: Final = 10_000
OPEN_CLIP: Final[Mapping[str, Any]] = {
    "loss": {"name": "infonce"},
    "train": {"weight_decay": 0.2, "schedule": "cosine", "clip_norm": 0.0},
    "data": {"augment": {"crop_min_area": 0.9}},
}
_INFONCE: Final[Mapping[str, Any]] = {"loss": {"name": "infonce"}}
RUNS: Final = "Single runs"


def open_clip(steps: int) -> dict[str, Any]:
    """Its defaults. A rate that rises by 5e-4 / 10,000 a step is, over a run shorter than that, a warm-up of
    the whole run to what it reaches in it."""
    if steps > OPEN_CLIP_WARMUP_STEPS:
        return merged(OPEN_CLIP, _rate(OPEN_CLIP_RATE, OPEN_CLIP_WARMUP_STEPS / steps))
    return merged(OPEN_CLIP, _rate(OPEN_CLIP_RATE * steps / OPEN_CLIP_WARMUP_STEPS, 1.0))


def _rate(rate: float, warmup_fraction: float) -> dict[str, Any]:
    return {"train": {"learning_rate": rate, "warmup_fraction": warmup_fraction}}


# A side: what its spec says beside data, model and budget, of a set and the steps of the run.
ARMS: Final[Mapping[str, Callable[[DomainSet, int], Mapping[str, Any]]]] = {
    OURS: lambda subject, steps: {"domain": subject.about.domain},
    PEER: lambda subject, steps: open_clip(steps),
    "open_clip, warmed up": lambda subject, steps: merged(OPEN_CLIP, _rate(OPEN_CLIP_RATE, 0.1)),
    "recipe, InfoNCE": lambda subject, steps: {"domain": subject.about.domain, **_INFONCE},
    "InfoNCE": lambda subject, steps: _INFONCE,
}


def works(
    subject: DomainSet, arms: Sequence[str], seeds: Sequence[int], *, model: str, device: str, epochs: int
) -> list[Work]:
    """The runs on one set. What they have in common is said once, by `budget`."""
    steps = subject.rows("train") // 64 * epochs
    return [
        Work(
            subject=subject,
            arm=arm,
            spec=merged(budget(model, device, epochs=epochs, seed=seed), ARMS[arm](subject, steps)),
            device=device,
        )
        for seed in seeds
        for arm in arms
    ]


def lines_of(subject: DomainSet, start: Mapping[Any, Any], found: Sequence[Judged]) -> list[Columns]:
    """A set's lines: a side for each question, by the means over the seeds that all its sides ran."""
    arms = [arm for arm in ARMS if any(one.arm == arm for one in found)]
    metric = recipe_metric(subject)
    lines: list[Columns] = []
    for question in subject.about.questions:

        def value(one: Judged, prompts: str, column: str = question.column) -> float:
            return one.test[column, prompts][metric]

        for arm in (START, *arms):
            runs = {one.seed: one for one in found if one.arm == arm}
            pairs = [(runs[one.seed], one) for one in found if one.arm == PEER and one.seed in runs]
            said = {prompts: [value(one, prompts) for one in runs.values()] for prompts in (RECIPE, PLAIN)}
            if arm == START:
                said = {prompts: [start[question.column, prompts][metric]] for prompts in said}
            more = plus_minus([value(ours, RECIPE) - value(peer, RECIPE) for ours, peer in pairs] or [0.0])
            lines.append(
                {
                    "set": subject.name,
                    "question": question.column,
                    "metric": metric.partition("/")[2].replace("_", " "),
                    "side": arm,
                    "seeds": len(runs),
                    "recipe's prompts": plus_minus(said[RECIPE]),
                    "plain prompt": plus_minus(said[PLAIN]),
                    "more than the peer": "–" if not pairs or arm == PEER else more,
                }
            )
    return lines


def run_lines(subject: DomainSet, found: Sequence[Judged]) -> list[Columns]:
    """Each run on its own."""
    metric = recipe_metric(subject)
    return [
        {
            "set": one.subject,
            "side": one.arm,
            "seed": one.seed,
            "question": column,
            "prompts": prompts,
            "%": round(100 * metrics[metric], 2),
            "validation %": round(100 * one.validation, 2),
            "steps": one.steps,
            "ms a step": round(1e3 * one.step_s, 1),
        }
        for one in sorted(found, key=lambda one: (list(ARMS).index(one.arm), one.seed))
        for (column, prompts), metrics in one.test.items()
    ]


def joined(lines: Sequence[Columns], runs: Sequence[Columns], device: str | None) -> Result:
    """What there is so far; stored lines of sets that this call does not run stay as they are."""
    fresh = Result.of(NAME, lines, device=device, more={RUNS: runs})
    known = {line["set"] for line in lines}
    old = next((one for one in stored_results() if one.file_name == fresh.file_name), None)
    kept = [line for line in old.rows if line["set"] not in known] if old else []
    kept_runs = [line for line in old.more.get(RUNS, ()) if line["set"] not in known] if old else []
    return Result.of(NAME, [*kept, *lines], device=device, more={RUNS: [*kept_runs, *runs]})


def main() -> None:
    """Entry point."""
    parser = arguments_of(__doc__)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="SIDE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as home:
        subjects = [lay_ready(name, given.data, Path(home), rows=given.rows) for name in given.sets]
        wanted = [
            work
            for subject in subjects
            for work in works(
                subject,
                given.arms,
                range(given.seeds),
                model=given.model,
                device=given.device,
                epochs=given.epochs,
            )
        ]
        # Seed by seed, so that a run cut short has whole comparisons.
        wanted.sort(key=lambda work: work.seed)
        start = {subject.name: starting_point(subject, given.model, given.device) for subject in subjects}
        found: list[Judged] = []
        result = None
        for one in all_trained(wanted, given.parallel):
            found.append(one)
            lines: list[Columns] = []
            runs: list[Columns] = []
            for subject in subjects:
                of_set = [other for other in found if other.subject == subject.name]
                lines += lines_of(subject, start[subject.name], of_set)
                runs += run_lines(subject, of_set)
            result = joined(lines, runs, device_name(given.device))
            if not given.rows:
                result.store()
            print(f"{one.subject}, {one.arm}, seed {one.seed}: {one.train_s:.1f} s", flush=True)
        if result is not None:
            print(tables(result))


if __name__ == "__main__":
    main()
