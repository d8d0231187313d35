"""Preparation: whether a job can run, and what it will take. On the CPU, whatever device the job will use.

Enters: the job's folder. Leaves: a `JobPlan` in the journal, and what was found out about the data for
`run`. Called by `main`. Whatever is wrong with spec, data or model is said here, before the job waits for a
device.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from cliptune.domains import Layered
from cliptune.durable import write_atomically
from cliptune.errors import OverloadedError
from cliptune.tracing import tracer
from cliptune.v1 import job_pb2
from cliptune_model.choice import Choice
from cliptune_model.chosen_similarity import tell_similarity
from cliptune_model.clip import Clip, build
from cliptune_trainer.contract import remember_own_code, try_own_code
from cliptune_trainer.data.dataset import Dataset, read_dataset
from cliptune_trainer.data.forms.columns import Wording
from cliptune_trainer.data.loading.loader import Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.guard.measure import decide_guard, open_probe
from cliptune_trainer.job import JobFolder
from cliptune_trainer.losses.entry import TEACHER
from cliptune_trainer.losses.temperature import begin, hold
from cliptune_trainer.plan.decide import Decisions, decide, decide_hardware
from cliptune_trainer.plan.per_size import Executions, plan_sizes
from cliptune_trainer.plan.plan_spec import domain_choices, spec_as_run
from cliptune_trainer.plan.planning import Planner
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec import Spec
from cliptune_trainer.steps.depth import projections
from cliptune_trainer.steps.frozen_features import plan_frozen
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step, StepOutOfMemoryError
from cliptune_trainer.steps.teacher import StartingModel
from cliptune_trainer.steps.trainable import make_trainable
from cliptune_trainer.tuning.space import check_measured, space_choices, space_of
from cliptune_trainer.tuning.space_file import write_space

# The timed step is a small one, scaled up: preparation must not take long.
_TIMED_PAIRS: Final = 16
# A forward pass without gradients against a whole step.
_FORWARD_SHARE: Final = 1 / 3


def prepare(job: JobFolder, roots: Sequence[Path], reporter: Reporter) -> None:
    """Checks everything and journals notices and the plan. Raises a `CliptuneError` for what is wrong."""
    with tracer().start_as_current_span("prepare.spec"):
        layers, spec = job.layers(), job.spec()
        hardware = decide_hardware(spec, job.home)
        torch.set_num_threads(int(hardware.threads.value))
    with tracer().start_as_current_span("prepare.data"):
        dataset = read_dataset(
            spec.data,
            DataRoots(roots),
            seed=spec.train.seed,
            wording=Wording(names=spec.evaluation.label_names, templates=spec.evaluation.prompt_templates),
            cache=job.path,
        )
        write_atomically(job.findings, json.dumps(dataset.findings.store()).encode())
    with tracer().start_as_current_span("prepare.model"):
        clip, trainable = make_trainable(build(spec.model, seed=spec.train.seed), spec)
        if spec.train.probe_fraction:
            projections(clip.model)  # refuses a tower without one
        decisions = decide(spec, hardware, dataset, clip)
        told = (
            *trainable,
            tell_similarity(spec.model, clip.similarity),
            *try_own_code(spec.loss, clip.similarity),
        )
        guard = decide_guard(spec, clip)
        if guard.value == "on":
            # Read here to be refused here.
            open_probe(spec, DataRoots(roots), examined=False, cache=job.path)
        remember_own_code(job.own_code, spec.loss, clip.similarity.name)
        rows_seen = decisions.total_steps * decisions.batch_size
        frozen = plan_frozen(spec, dataset.train, clip, decisions.sizes, rows_seen=rows_seen).choices
        decisions = replace(decisions, choices=(*decisions.choices, guard, *told, *frozen))
    with tracer().start_as_current_span("prepare.memory"):
        on_cpu = hardware.device.value == "cpu"

        def planner(spec: Spec, clip: Clip) -> Planner:
            return Planner.of_job(spec, hardware, clip, job.home, decisions, dataset, on_device=on_cpu)

        executions = plan_sizes(planner, spec, clip, decisions.sizes)
        scale = begin(clip.model, spec.loss)
    with tracer().start_as_current_span("prepare.measure"):
        # Another device is left alone: another job may be at work there.
        step_s = _try_out(spec, dataset, clip, decisions, executions) if on_cpu else 0.0
    plan = _plan(layers, spec, dataset, clip, decisions, executions, scale, step_s)
    if spec.tune is not None:
        classes = len(decisions.classes)
        check_measured(spec.tune, validation_rows=len(dataset.validation), classes=classes)
        dimensions = space_of(layers.spec, spec, decisions.learning_rate)
        write_space(job.study, dimensions)
        plan.decisions.extend(_told(space_choices(dimensions)))
    for remark in decisions.remarks:
        reporter.notice(remark.code, remark.message, warning=remark.warning)
    reporter.plan(plan)


def _told(choices: Iterable[Choice]) -> list[job_pb2.Decision]:
    return [
        job_pb2.Decision(subject=choice.subject, choice=choice.value, reason=choice.reason)
        for choice in choices
    ]


def _plan(
    layers: Layered,
    spec: Spec,
    dataset: Dataset,
    clip: Clip,
    decisions: Decisions,
    executions: Executions,
    scale: Choice,
    step_s: float,
) -> job_pb2.JobPlan:
    """`step_s` is of a whole batch of the largest images on the CPU."""
    execution = executions.common
    plan = execution.plan
    seconds = 0.0
    if decisions.hardware.device.value == "cpu":
        epochs = decisions.total_steps // decisions.steps_per_epoch
        every = spec.evaluation.every_epochs
        evaluations = 2 + (max(epochs - 1, 0) // every if every else 0) if len(dataset.validation) else 0
        if evaluations and any((one.subject, one.value) == ("guard", "on") for one in decisions.choices):
            evaluations += len(spec.guard.points) + 2  # the ends are measured with the others
        images = len(set(dataset.validation.image_ids.tolist()))
        evaluation_s = step_s * _FORWARD_SHARE * images / decisions.batch_size
        share = decisions.sizes.mean(math.prod) / math.prod(executions.largest)
        seconds = decisions.total_steps * share * step_s + evaluations * evaluation_s
    captions = {pair.caption for pair in dataset.train.pairs + dataset.validation.pairs}
    return job_pb2.JobPlan(
        device=decisions.hardware.device.value,
        precision=execution.precision,
        train_samples=len(dataset.train),
        validation_samples=len(dataset.validation),
        distinct_captions=len(captions),
        labels=dataset.labels,
        batch_size=decisions.batch_size,
        steps_per_epoch=decisions.steps_per_epoch,
        total_steps=decisions.total_steps,
        parameters=sum(parameter.numel() for parameter in clip.model.parameters()),
        estimated_memory_bytes=plan.estimated_bytes,
        estimated_seconds=seconds,
        decisions=_told((*domain_choices(layers), *decisions.choices, *executions.choices, scale)),
        bad_rows=len(dataset.bad),
        micro_batch_size=plan.micro_batch_size,
        attention=plan.attention,
        checkpointing=plan.checkpointing,
        memory_budget_bytes=plan.budget_bytes,
        spec=spec_as_run(layers, decisions, precision=execution.precision),
    )


def _try_out(spec: Spec, dataset: Dataset, clip: Clip, decisions: Decisions, executions: Executions) -> float:
    """Seconds of a step of the whole batch, from two small ones on real rows. Trains `clip`, which is thrown
    away."""
    execution, clip = executions.common, clip.at(executions.largest)
    pairs = min(decisions.batch_size, execution.plan.micro_batch_size, _TIMED_PAIRS)
    scale = decisions.batch_size / pairs
    objective = execution.objective(spec.loss, clip.similarity)
    teacher = StartingModel(deepcopy(clip)) if TEACHER in spec.loss.needs else None
    hold(clip.model, spec.loss)
    optimizer = build_optimizer(
        clip.model,
        learning_rate=1e-6,
        weight_decay=spec.train.weight_decay,
        beside={"similarity": clip.similarity, "loss": objective},
    )
    precision = Precision(execution.precision, clip.device)
    step = Step(clip, objective, optimizer, precision, clip_norm=spec.train.clip_norm, teacher=teacher)
    clip.model.train()
    with Loader(
        dataset.train,
        clip,
        augmentation=spec.data.augment,
        batch_size=pairs,
        seed=spec.train.seed,
        needs=spec.loss.needs,
        max_bad=len(dataset.train),
    ) as loader:
        first, second = loader.batches(0, 2) if loader.steps_per_epoch > 1 else [*loader.batches(0, 1)] * 2
    try:
        step(first, 0.0)  # allocates the optimizer's state
        began = time.perf_counter()
        step(second, 0.0)
    except StepOutOfMemoryError as error:
        raise OverloadedError(
            f"a step of {pairs} pairs does not fit in the memory that is free now ({error}): try again when"
            " more is free, or choose a smaller model"
        ) from error
    return (time.perf_counter() - began) * scale
