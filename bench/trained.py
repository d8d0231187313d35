"""A job of the trainer, run in this process as the daemon's trainer runs it, and judged on the test split.

Enters: a data set and a spec. Leaves: metrics of images that neither training nor validation saw. Used by
`domains`, `temperature` and `tuning`, in processes beside each other where a GPU has room for several.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Final

import torch

from bench.domain_sets import SETS, TEST, DomainSet, Question
from bench.record import gpu
from cliptune.domains import recipe
from cliptune.spec import spec_from_mapping
from cliptune_model.clip import Clip, build
from cliptune_model.exported import read_manifest
from cliptune_model.machine.hardware import host
from cliptune_model.machine.policy import prepare_process
from cliptune_model.source import ModelSource
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.forms.reader import read_table
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.evaluation.measure import evaluate
from cliptune_trainer.evaluation.measurement import Measurement
from cliptune_trainer.job import JobFolder
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.spec import ClassConfig, DataConfig, EvaluationConfig, Spec, from_proto
from cliptune_trainer.spec.evaluation import DEFAULT_TEMPLATES
from cliptune_trainer.training.run import run

# The prompts that a model is judged by: those of its domain's recipe, and the one of a spec without a domain.
RECIPE: Final = "recipe"
PLAIN: Final = "plain"
_NEVER: Final = 2**31 - 1
# Two-sided 95 % of Student's t, by degrees of freedom.
_T_95: Final = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One run: a set, what the spec says beyond the data, and whose run it is. `general`: tables of general
    pairs by name, which the model is asked about beside the set's test split."""

    subject: DomainSet
    arm: str
    spec: Mapping[str, Any]
    device: str
    general: Mapping[str, Path] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of order and augmentation."""
        return int(self.spec["train"]["seed"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What came of a run.

    Attributes:
        arm, seed, subject: as in the `Work`; `subject` is the set's name.
        test: (question's column, prompts) → metrics on the test split, by name.
        validation: the main metric that the job itself told after training.
        logit_scale: after training.
        steps: of the run.
        step_s: seconds of a step, the median; NaN of a single step.
        train_s: seconds from the first step's end to the last's.
        general: name of a table of the `Work` → metrics on it.
        share: of the way from the starting weights to the trained ones that was published; 1: no guard chose.
    """

    arm: str
    seed: int
    subject: str
    test: Mapping[tuple[str, str], Mapping[str, float]]
    validation: float
    logit_scale: float
    steps: int
    step_s: float
    train_s: float
    general: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    share: float = 1.0


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings of a spec's form over each other, the later ones above."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = isinstance(value, Mapping) and isinstance(whole.get(key), Mapping)
            whole[key] = merged(whole[key], value) if inner else value
    return whole


def budget(model: str, device: str, *, epochs: int, seed: int, threads: int | None = None) -> dict[str, Any]:
    """What all sides of a comparison have in common: model, rows, batches, epochs, machine."""
    resources: dict[str, Any] = {"device": device}
    if threads is not None:
        resources["threads"] = threads
    return {
        "model": {"name": model},
        "train": {"epochs": epochs, "batch_size": 64, "seed": seed, "compile": "off"},
        "data": {"workers": 0},
        # Nothing is chosen on validation rows, so they are looked at before and after only.
        "evaluation": {"every_epochs": 0, "bootstrap_samples": 0},
        "checkpoint": {"every_steps": _NEVER, "keep": 1},
        # What is compared is what training makes of the weights, all of it.
        "guard": {"off": True},
        "resources": resources,
    }


def train(work: Work) -> Judged:
    """Runs the job to its end and judges its export. Raises what the trainer raises."""
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as folder:
        job = JobFolder(Path(folder))
        spec = merged(work.subject.spec(), work.spec)
        (job.path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        journal = Journal(job.journal(1), 1)
        prepare_process(work.device, host())
        try:
            ending = run(job, (), Reporter(journal), Inbox(), linked=False)
        finally:
            journal.close()
        if not ending.export_path:
            raise RuntimeError(f"{work.arm} on {work.subject.name} left no model")
        clip = build(ModelSource(name=f"local-dir:{job.export}"), device=work.device)
        events = [json.loads(line) for line in job.journal(1).read_text(encoding="utf-8").splitlines()]
        times = [_seconds(event["time"]) for event in events if "progress" in event.get("event", {})]
        return Judged(
            arm=work.arm,
            seed=work.seed,
            subject=work.subject.name,
            test=test(clip, work.subject, job.spec()),
            validation=_told(events, recipe_metric(work.subject)),
            logit_scale=round(float(clip.logit_scale), 3),
            steps=len(times),
            step_s=median(later - sooner for sooner, later in pairwise(times)) if times[1:] else math.nan,
            train_s=times[-1] - times[0],
            general=general(clip, work.general),
            share=read_manifest(job.export).guard.get("share", 1.0),
        )


def starting_point(
    subject: DomainSet, model: str, device: str
) -> Mapping[tuple[str, str], Mapping[str, float]]:
    """The same figures before any training."""
    spec = from_proto(spec_from_mapping(merged(subject.spec(), {"model": {"name": model}})))
    return test(build(spec.model, device=device), subject, spec)


def test(clip: Clip, subject: DomainSet, spec: Spec) -> dict[tuple[str, str], Mapping[str, float]]:
    """Every question of the set, by the recipe's prompts and by the plain one, whatever the job's were."""
    templates = {
        RECIPE: tuple(recipe(subject.about.domain).evaluation.prompt_templates),
        PLAIN: DEFAULT_TEMPLATES,
    }
    return {
        (question.column, prompts): asked(clip, subject, spec, question, said).metrics
        for question in subject.about.questions
        for prompts, said in templates.items()
    }


def general(clip: Clip, tables: Mapping[str, Path]) -> dict[str, Mapping[str, float]]:
    """Retrieval on tables of general pairs, all rows of each."""
    return {
        name: evaluate(
            clip,
            Pairs(read_table(str(path), DataConfig(train=str(path)), DataRoots()).pairs),
            (),
            batch_size=256,
        ).metrics
        for name, path in tables.items()
    }


def asked(
    clip: Clip, subject: DomainSet, spec: Spec, question: Question, templates: tuple[str, ...]
) -> Measurement:
    """One question of the set, in the words of these prompts, over the test split."""
    message = spec_from_mapping(
        merged(subject.spec(), {"model": {"name": "any"}, "data": {"label_column": question.column}})
    )
    message.data.split_column = ""
    config = from_proto(message).data
    table = read_table(str(subject.folder / TEST), config, DataRoots())
    wording = EvaluationConfig(prompt_templates=templates, label_names=question.names)
    classes = [ClassConfig(label=label, prompts=wording.prompts_of(label)) for label in question.names]
    return evaluate(clip, Pairs(table.pairs, reading=spec.data.reading), classes, batch_size=256)


def recipe_metric(subject: DomainSet) -> str:
    """The one that the set's domain says counts."""
    return recipe(subject.about.domain).evaluation.main_metric


def all_trained(works: Sequence[Work], parallel: int) -> Iterator[Judged]:
    """Runs, as they end. More than one at a time: each in a process of its own."""
    for _, judged in each_trained(works, parallel):
        yield judged


def each_trained(works: Sequence[Work], parallel: int) -> Iterator[tuple[Work, Judged]]:
    """Runs, as they end, each with what it was asked for."""
    if parallel == 1:
        for work in works:
            yield work, train(work)
        return
    with ProcessPoolExecutor(parallel, mp_context=get_context("spawn")) as pool:
        asked = {pool.submit(train, work): work for work in works}
        for future in as_completed(asked):
            yield asked[future], future.result()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and how far its 95 % interval reaches to both sides by Student's t; NaN of a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), _T_95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def plus_minus(values: Sequence[float], digits: int = 1) -> str:
    """Mean and interval of shares, in percent: "71.3 ± 2.1"."""
    mean, half = interval([100 * value for value in values])
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def _told(events: Sequence[Mapping[str, Any]], metric: str) -> float:
    """What the job measured on its validation rows after training; NaN: nothing."""
    for event in reversed(events):
        found = event.get("event", {}).get("evaluation", {})
        if found.get("occasion") == "after":
            return float(found["metrics"].get(metric, math.nan))
    return math.nan


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def device_name(device: str) -> str | None:
    """What results are filed under; None: this machine's cores."""
    return gpu(torch.cuda.get_device_name()) if device == "cuda" else None


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """Arguments that the benchmarks on these sets share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the tars")
    parser.add_argument("--model", default="cliptune-mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=0, help="of each split, to try it out: nothing is stored")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once (default: %(default)s)")
    return parser
