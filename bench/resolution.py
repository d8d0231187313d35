"""Schedules of image sizes beside the fixed size: time, metric, and the worst size over a sweep.

    python -m bench.resolution --data FOLDER --device cuda

FOLDER holds the tar scientific_nuclei; solar cells come from the package elpv-dataset. Every run starts from
the same model and sees the same rows, captions, batches, epochs and steps, by its domain's recipe; a seed
sets order and augmentation, and what sizes are drawn. `fixed` trains at the model's own size; `progressive`
and `multi_scale` as a job does that names the schedule and nothing else. Runs go one after another: their
times are compared.

Figures are the metric that the domain's recipe says counts, of images of the test split, which neither
training nor a choice saw: at the model's own size, and at each size of the sweep, from a half of it to one
and a half; "worst size" is the lowest of these. Mean over seeds, in percent, and how far the 95 % interval
(Student's t) reaches; "more than fixed" is of the runs in pairs, seed by seed. "times faster" is the fixed
run's time from the first step's end to the last's, over the schedule's: on the CPU, of the processor, which
other work on the machine hardly changes (with --threads 1, so that no thread waits for another).

A switch of the size is what a pass at another size costs beside its own work: positions for the grid, put in
and taken out; the first time, with the matrices that are kept, and afterwards.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import torch

from bench.domain_sets import DomainSet, lay_ready
from bench.record import Columns, Result, tables
from bench.trained import (
    arguments_of,
    asked,
    budget,
    device_name,
    merged,
    plus_minus,
    recipe_metric,
)
from cliptune.domains import recipe
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip, build
from cliptune_model.image_sizes import fitted
from cliptune_model.machine.hardware import host
from cliptune_model.machine.policy import prepare_process
from cliptune_model.machine.synchronize import synchronize
from cliptune_model.source import ModelSource
from cliptune_model.towers.image_tower import image_tower
from cliptune_model.towers.positions import axis_matrix
from cliptune_trainer.job import JobFolder
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.training.run import run

NAME: Final = "resolution"
FIXED: Final = "fixed"
SIDES: Final = (FIXED, "progressive", "multi_scale")
SETS: Final = ("scientific_nuclei", "elpv")
SWEEP: Final = (0.5, 0.75, 1.0, 1.25, 1.5)
SIZES: Final = "By size"
SWITCHES: Final = "A switch of the size"
_SWITCHED: Final = ("cliptune-mini-vit", "ViT-B-16")
_REPEATS: Final = 50


class Watch(Reporter):
    """A job's reporter that keeps the time of every step's end, in seconds."""

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        super().__init__(journal)
        self._clock: Final = clock
        self.times_s: Final[list[float]] = []

    def progress(self, progress: job_pb2.Progress) -> None:
        """Passes it on."""
        self.times_s.append(self._clock())
        super().progress(progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came of one run: seconds, and the metric on the test split by side of the image."""

    subject: str
    side: str
    seed: int
    train_s: float
    steps: int
    own: int
    by_size: Mapping[int, float]

    @property
    def worst(self) -> float:
        """Of the sweep."""
        return min(self.by_size.values())


def trained(
    subject: DomainSet, side: str, seed: int, *, model: str, device: str, epochs: int, threads: int | None
) -> Trained:
    """Runs a job as the daemon's trainer does, and measures its export at every size."""
    schedule = {} if side == FIXED else {"resolution": {"schedule": side}}
    spec = merged(
        subject.spec(),
        budget(model, device, epochs=epochs, seed=seed, threads=threads),
        {
            "domain": subject.about.domain,
            "train": schedule,
            "evaluation": {"degradations": False},
        },
    )
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as folder:
        job = JobFolder(Path(folder))
        (job.path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        journal = Journal(job.journal(1), 1)
        watch = Watch(journal, time.process_time if device == "cpu" else time.perf_counter)
        prepare_process(device, host())
        try:
            ending = run(job, (), watch, Inbox(), linked=False)
        finally:
            journal.close()
        if not ending.export_path:
            raise RuntimeError(f"{side} on {subject.name} left no model")
        clip = build(ModelSource(name=f"local-dir:{job.export}"), device=device)
        metric, question = recipe_metric(subject), subject.about.questions[0]
        prompts = tuple(recipe(subject.about.domain).evaluation.prompt_templates)
        by_size = {
            at.image_size[0]: asked(at, subject, job.spec(), question, prompts).metrics[metric]
            for at in sweep(clip)
        }
        return Trained(
            subject=subject.name,
            side=side,
            seed=seed,
            train_s=watch.times_s[-1] - watch.times_s[0],
            steps=len(watch.times_s),
            own=clip.image_size[0],
            by_size=by_size,
        )


def sweep(clip: Clip) -> list[Clip]:
    """The model at each size of the sweep."""
    height, width = clip.image_size
    return [clip.at(fitted(clip, (int(share * height), int(share * width)))) for share in SWEEP]


def lines_of(found: Sequence[Trained]) -> list[Columns]:
    """A line for each set and side."""
    lines: list[Columns] = []
    for subject in SETS:
        fixed = {one.seed: one for one in found if (one.subject, one.side) == (subject, FIXED)}
        for side in SIDES:
            runs = [one for one in found if (one.subject, one.side) == (subject, side)]
            pairs = [(one, fixed[one.seed]) for one in runs if one.seed in fixed]
            if not pairs:
                continue
            faster = fmean(peer.train_s for _, peer in pairs) / fmean(one.train_s for one, _ in pairs)
            lines.append(
                {
                    "set": subject,
                    "side": side,
                    "seeds": len(pairs),
                    "steps": runs[0].steps,
                    "seconds": round(fmean(one.train_s for one, _ in pairs), 1),
                    "times faster": round(faster, 2),
                    "own size": plus_minus([one.by_size[one.own] for one, _ in pairs]),
                    "more than fixed": _more(
                        [one.by_size[one.own] - p.by_size[p.own] for one, p in pairs], side
                    ),
                    "worst size": plus_minus([one.worst for one, _ in pairs]),
                    "worst, more than fixed": _more([one.worst - p.worst for one, p in pairs], side),
                }
            )
    return lines


def _more(differences: Sequence[float], side: str) -> str:
    return "–" if side == FIXED else plus_minus(differences)


def size_lines(found: Sequence[Trained]) -> list[Columns]:
    """The sweep: a line for each set and side, a column for each size."""
    lines: list[Columns] = []
    for subject in SETS:
        for side in SIDES:
            runs = [one for one in found if (one.subject, one.side) == (subject, side)]
            if runs:
                sizes = {str(at): plus_minus([one.by_size[at] for one in runs]) for at in runs[0].by_size}
                lines.append({"set": subject, "side": side, **sizes})
    return lines


def switch_lines(device: str) -> list[Columns]:
    """What a pass at another size costs beside its own work."""
    lines: list[Columns] = []
    for name in _SWITCHED:
        clip = build(ModelSource(name=name), device=device)
        tower = image_tower(clip.model)
        grids = [tower.grid_at(at.image_size) for at in sweep(clip) if at is not clip]
        axis_matrix.cache_clear()
        first = [_switch_s(clip, grid) for grid in grids]
        later = [_switch_s(clip, grid) for _ in range(_REPEATS) for grid in grids]
        lines.append(
            {
                "model": name,
                "first ms": round(1e3 * max(first), 3),
                "later ms": round(1e3 * median(later), 3),
            }
        )
    return lines


@torch.no_grad()
def _switch_s(clip: Clip, grid: tuple[int, int]) -> float:
    device = str(clip.device)
    synchronize(device)
    began_s = time.perf_counter()
    with image_tower(clip.model).at(grid):
        pass
    synchronize(device)
    return time.perf_counter() - began_s


def main() -> None:
    """Entry point."""
    parser = arguments_of(__doc__)
    parser.set_defaults(model="cliptune-mini-vit", sets=list(SETS))
    parser.add_argument("--threads", type=int, help="of torch (default: as a job chooses)")
    given: Any = parser.parse_args()
    switches = switch_lines(given.device)
    found: list[Trained] = []
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as home:
        subjects = [lay_ready(name, given.data, Path(home), rows=given.rows) for name in given.sets]
        # Seed by seed and set by set, so that a run cut short has whole comparisons.
        for seed in range(given.seeds):
            for subject in subjects:
                for side in SIDES:
                    one = trained(
                        subject,
                        side,
                        seed,
                        model=given.model,
                        device=given.device,
                        epochs=given.epochs,
                        threads=given.threads,
                    )
                    found.append(one)
                    told = ", ".join(f"{at}: {100 * value:.1f}" for at, value in one.by_size.items())
                    print(f"{one.subject}, {side}, seed {seed}: {one.train_s:.1f} s; {told}", flush=True)
                result = Result.of(
                    NAME,
                    lines_of(found),
                    device=device_name(given.device),
                    more={SIZES: size_lines(found), SWITCHES: switches},
                )
                if not given.rows:
                    result.store()
    print(tables(result))


if __name__ == "__main__":
    main()
