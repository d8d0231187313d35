"""Whether fine-tuning here makes better models, and what they forget: every way beside every other.

    python -m bench.quality --data FOLDER --device cuda --parallel 4
    python -m bench.quality --data FOLDER --model cliptune-mini-vit --amounts few    # a part of it, on a CPU

FOLDER holds the tars medical_bccd, scientific_nuclei, general_clipart and general_tuxpaint_stamps; solar
cells come from the package elpv-dataset. Both embedded models start on each set, with all rows and with 16
images a class, `--seeds` times. Runs on the same rows have the same order, batches and epochs; with few rows
there are more epochs. Figures are of the test split: the metric that the set's domain says counts, by its
recipe's prompts, in percent, mean over seeds and how far the 95 % interval (Student's t) reaches. A gain is
over the starting model; "more than open_clip" is of the runs in pairs, seed by seed. General loss is of
recall@1 of text from image in points, the mean of all stamps and the clip art's test split.

Runs are kept as they end, in `bench/results/quality.DEVICE.runs.jsonl`: the same command goes on where it was
cut off, other ones add to the table.

Sides: `open_clip` does what open_clip_train does unless told otherwise (see `bench.domains`). `FLYP` has the
settings of Goyal et al. 2023: 1e-5 with a decay of 0.1 on InfoNCE. `recipe` is what naming the domain
brings, unguarded; `guard` is the same with the clip art's validation split as its probe, `guard, no data`
without one, by the pictures of that split that cliptune-mini brings; `mean` and `L2-SP` add one of the two to
`guard`. `LoRA` trains adapters of rank 2 alone.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from bench.domain_sets import ALL, SETS, DomainSet, lay_ready, read_rows, write_rows
from bench.domains import open_clip
from bench.kept_runs import KeptRuns, asked_for, runs_file
from bench.record import Columns, Result, tables
from bench.trained import (
    RECIPE,
    Judged,
    Work,
    arguments_of,
    budget,
    device_name,
    each_trained,
    general,
    interval,
    merged,
    plus_minus,
    recipe_metric,
    starting_point,
)
from cliptune.domains import layered
from cliptune.spec import spec_from_mapping
from cliptune_model.clip import build
from cliptune_model.source import ModelSource
from cliptune_trainer.spec import from_proto
from cliptune_trainer.steps.trainable import make_trainable

NAME: Final = "quality"
PEER: Final = "open_clip"
OURS: Final = "recipe"
GUARD: Final = "guard"
FULL: Final = "all rows"
SHOTS: Final = 16
FEW: Final = f"{SHOTS} a class"
MODELS: Final = ("cliptune-mini", "cliptune-mini-vit")
_GENERAL: Final = {"general_clipart": "test", "general_tuxpaint_stamps": ""}
_PROBE: Final = ("general_clipart", "val")
_RECALL: Final = "retrieval/image_to_text_recall@1"

Arm = Callable[[DomainSet, int, Path], Mapping[str, Any]]


def _guarded(subject: DomainSet, steps: int, probe: Path, **more: float) -> dict[str, Any]:
    return {"domain": subject.about.domain, "guard": {"off": False, "probe": {"data": str(probe)}, **more}}


# A side: what its spec says beside data, model and budget, of a set, the steps of the run and a probe.
ARMS: Final[Mapping[str, Arm]] = {
    PEER: lambda subject, steps, probe: open_clip(steps),
    "FLYP": lambda subject, steps, probe: {
        "loss": {"name": "infonce"},
        "train": {"learning_rate": 1e-5, "weight_decay": 0.1},
    },
    OURS: lambda subject, steps, probe: {"domain": subject.about.domain},
    GUARD: _guarded,
    "guard, no data": lambda subject, steps, probe: {
        "domain": subject.about.domain,
        "guard": {"off": False},
    },
    "mean": lambda subject, steps, probe: _guarded(subject, steps, probe, ema_decay=0.99),
    "L2-SP": lambda subject, steps, probe: _guarded(subject, steps, probe, l2_sp=10.0),
    "LoRA": lambda subject, steps, probe: {
        "domain": subject.about.domain,
        "adapter": {"kind": "lora", "rank": 2},
    },
}


def few(subject: DomainSet, shots: int = SHOTS) -> DomainSet:
    """The same set with so many training images of each label, the same ones each time; other splits stay."""
    folder = subject.folder.with_name(f"{subject.name}-{shots}")
    folder.mkdir(exist_ok=True)
    (folder / "test.csv").write_bytes((subject.folder / "test.csv").read_bytes())
    label = subject.about.questions[0].column
    rows = read_rows(subject.folder / ALL)
    drawn = sorted(
        (row for row in rows if row["split"] == "train"),
        key=lambda row: hashlib.sha256(row["image"].encode()).digest(),
    )
    taken: Counter[str] = Counter()
    kept = [row for row in rows if row["split"] != "train"]
    for row in drawn:
        if taken[row[label]] < shots:
            taken[row[label]] += 1
            kept.append(row)
    write_rows(folder / ALL, kept)
    return replace(subject, folder=folder)


def general_tables(data: Path, home: Path) -> tuple[dict[str, Path], Path]:
    """Tables of general pairs to judge by, by name, and the one that guards choose by."""
    for name in {*_GENERAL, _PROBE[0]}:
        if not (home / name).exists():
            with tarfile.open(data / f"{name}.tar") as archive:
                archive.extractall(home, filter="data")

    def table(name: str, split: str) -> Path:
        rows = read_rows(home / name / "captions.csv")
        path = home / name / f"{split or 'every'}-rows.csv"
        kept = [row for row in rows if not split or row["split"] == split]
        write_rows(path, [{"image": row["image"], "caption": row["caption"]} for row in kept])
        return path

    return {name: table(name, split) for name, split in _GENERAL.items()}, table(*_PROBE)


def works(
    subject: DomainSet,
    rows: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    *,
    model: str,
    device: str,
    epochs: int,
    judged_by: Mapping[str, Path],
    probe: Path,
) -> list[Work]:
    """The runs on one set. `arm` of each tells model, rows and side."""
    batch = min(64, subject.rows("train"))
    steps = subject.rows("train") // batch * epochs
    given = merged(budget(model, device, epochs=epochs, seed=0), {"train": {"batch_size": batch}})
    return [
        Work(
            subject=subject,
            arm="|".join((model, rows, arm)),
            spec=merged(given, ARMS[arm](subject, steps, probe), {"train": {"seed": seed}}),
            device=device,
            general=judged_by,
        )
        for seed in seeds
        for arm in arms
    ]


def trained_percent(work: Work) -> float:
    """Of the parameters, those that a run trains."""
    spec = from_proto(layered(spec_from_mapping(merged(work.subject.spec(), work.spec))).spec)
    whole = sum(one.numel() for one in build(spec.model).model.parameters())
    clip, _ = make_trainable(build(spec.model), spec)
    return 100 * sum(one.numel() for one in clip.model.parameters() if one.requires_grad) / whole


def known(found: Mapping[str, Mapping[str, float]]) -> float:
    """General recall@1, the mean over the tables."""
    return fmean(metrics[_RECALL] for metrics in found.values())


def lines_of(
    subject: DomainSet,
    model: str,
    rows: str,
    start: float,
    start_general: float,
    found: Sequence[Judged],
    percent: Mapping[str, float],
) -> list[Columns]:
    """A set's lines: a side each, by the seeds that it ran."""
    question, metric = subject.about.questions[0].column, recipe_metric(subject)

    def value(one: Judged) -> float:
        return one.test[question, RECIPE][metric]

    sides = {arm: {one.seed: one for one in found if one.arm == "|".join((model, rows, arm))} for arm in ARMS}
    peer, ours = sides[PEER], sides[OURS]
    lines: list[Columns] = []
    for arm, runs in sides.items():
        if not runs:
            continue
        more = [value(one) - value(peer[seed]) for seed, one in runs.items() if seed in peer]
        gains = [
            (value(one) - start, value(ours[seed]) - start) for seed, one in runs.items() if seed in ours
        ]
        whole = fmean(full for _, full in gains) if gains else 0.0
        lines.append(
            {
                "model": model,
                "set": subject.name,
                "rows": rows,
                "side": arm,
                "seeds": len(runs),
                "metric": metric.partition("/")[2].replace("_", " "),
                "start": round(100 * start, 1),
                "test": plus_minus([value(one) for one in runs.values()]),
                "more than open_clip": "–" if arm == PEER or not more else plus_minus(more),
                "of recipe's gain": f"{fmean(part for part, _ in gains) / whole:.0%}" if whole > 0 else "–",
                "general loss": plus_minus([start_general - known(one.general) for one in runs.values()], 2),
                "share of the way": round(fmean(one.share for one in runs.values()), 2),
                "trained %": round(percent.get(arm, 100.0), 2),
            }
        )
    return lines


def over_all(found: Sequence[Judged], starts: Mapping[tuple[str, str], float]) -> list[Columns]:
    """General loss of each side, over models, sets, rows and seeds. `starts`: (model, "") → its recall."""
    lines: list[Columns] = []
    for arm in ARMS:
        losses = [
            starts[one.arm.split("|")[0], ""] - known(one.general)
            for one in found
            if one.arm.split("|")[2] == arm
        ]
        if losses:
            mean, half = interval([100 * loss for loss in losses])
            lines.append({"side": arm, "runs": len(losses), "general loss": f"{mean:.2f} ± {half:.2f}"})
    return lines


def start_key(model: str, subject: str = "") -> str:
    """Of a starting model's figure on a set, or of its general knowledge."""
    return f"{model}|{subject}"


def trained_key(model: str, arm: str) -> str:
    """Of the share of the parameters that an adapter's side trains, in percent."""
    return f"{model}||{arm}"


def result_of(kept: KeptRuns, device: str | None) -> Result:
    """The tables of all runs that are kept, by whichever command.

    Args:
        kept: the runs, and figures of their starting models.
        device: that they ran on; None: this machine's cores.
    """
    sets = [DomainSet(name=name, folder=Path(), images=Path()) for name in SETS]
    # Of runs that differ in their budget the last one counts.
    found = list({(one.arm, one.subject, one.seed): one for one in kept.found.values()}.values())
    models = sorted({one.arm.split("|")[0] for one in found})
    lines = [
        line
        for model in models
        for rows in (FULL, FEW)
        for subject in sets
        if start_key(model, subject.name) in kept.starts
        for line in lines_of(
            subject,
            model,
            rows,
            kept.starts[start_key(model, subject.name)],
            kept.starts[start_key(model)],
            [other for other in found if other.subject == subject.name],
            {arm: kept.starts.get(trained_key(model, arm), 100.0) for arm in ARMS},
        )
    ]
    knew = {(model, ""): kept.starts[start_key(model)] for model in models}
    more = {"What is forgotten, over all runs": over_all(found, knew)}
    return Result.of(NAME, lines, device=device, more=more)


def measure_starts(
    kept: KeptRuns, model: str, sets: Sequence[DomainSet], device: str, judged_by: Mapping[str, Path]
) -> None:
    """What a model can do before any training, where it is not kept yet."""
    if start_key(model) not in kept.starts:
        clip = build(ModelSource(name=model), device=device)
        kept.add_start(start_key(model), known(general(clip, judged_by)))
    for subject in sets:
        if (key := start_key(model, subject.name)) not in kept.starts:
            asked = starting_point(subject, model, device)
            kept.add_start(key, asked[subject.about.questions[0].column, RECIPE][recipe_metric(subject)])


def main() -> None:
    """Entry point."""
    parser = arguments_of(__doc__)
    parser.set_defaults(model="")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="SIDE")
    parser.add_argument("--few-epochs", type=int, default=40, help="with few rows (default: %(default)s)")
    parser.add_argument(
        "--amounts", nargs="+", choices=("all", "few"), default=["all", "few"], help="of training rows"
    )
    parser.add_argument("--anew", action="store_true", help="forget the runs that are kept")
    given = parser.parse_args()
    models = (given.model,) if given.model else MODELS
    device = device_name(given.device)
    path = None if given.rows else runs_file(NAME, device)
    if given.anew and path is not None:
        path.unlink(missing_ok=True)
    kept = KeptRuns(path)
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as folder:
        home = Path(folder)
        judged_by, probe = general_tables(given.data, home)
        whole = [lay_ready(name, given.data, home, rows=given.rows) for name in given.sets]
        subjects = [(FULL, one, given.epochs) for one in whole] if "all" in given.amounts else []
        subjects += [(FEW, few(one), given.few_epochs) for one in whole] if "few" in given.amounts else []
        wanted: list[Work] = []
        for model in models:
            measure_starts(kept, model, whole, given.device, judged_by)
            for rows, subject, epochs in subjects:
                wanted += works(
                    subject,
                    rows,
                    given.arms,
                    range(given.seeds),
                    model=model,
                    device=given.device,
                    epochs=epochs,
                    judged_by=judged_by,
                    probe=probe,
                )
        for work in wanted:
            model, _, arm = work.arm.split("|")
            if "adapter" in work.spec and (key := trained_key(model, arm)) not in kept.starts:
                kept.add_start(key, trained_percent(work))
        missing = [work for work in wanted if asked_for(work, home) not in kept.found]
        print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them kept from before", flush=True)
        # Seed by seed, so that a run cut short has whole comparisons.
        missing.sort(key=lambda work: work.seed)
        for work, one in each_trained(missing, given.parallel):
            kept.add(asked_for(work, home), one)
            print(f"{one.subject}, {one.arm}, seed {one.seed}: {one.train_s:.1f} s", flush=True)
            result = result_of(kept, device)
            if path is not None:
                result.store()
        print(tables(result_of(kept, device)))


if __name__ == "__main__":
    main()
