"""Preparation: whether a job can run, and what it will take. On the CPU, whatever device the job will use.

Enters: the job's folder. Leaves: a `JobPlan` in the journal, and what was found out about the data for
`run`. Called by `main`. Whatever is wrong with spec, data or model is said here, before the job waits for a
device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from cliptune.durable import write_atomically
from cliptune.tracing import tracer
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip, build
from cliptune_trainer.data.dataset import Dataset, read_dataset
from cliptune_trainer.data.loader import Batch, Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.decide import Decisions, decide, decide_hardware
from cliptune_trainer.events import Reporter
from cliptune_trainer.job import JobFolder
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.optim import build_optimizer
from cliptune_trainer.precision import Precision
from cliptune_trainer.spec import Spec
from cliptune_trainer.step import Step, contrastive_loss

# The timed step is a small one, scaled up: preparation must not take long.
_TIMED_PAIRS: Final = 16
# fp32 weight, gradient and Adam's two moments.
_BYTES_PER_PARAMETER: Final = 16
# A forward pass without gradients against a whole step.
_FORWARD_SHARE: Final = 1 / 3


def prepare(job: JobFolder, roots: Sequence[Path], reporter: Reporter) -> None:
    """Checks everything and journals notices and the plan. Raises a `CliptuneError` for what is wrong."""
    with tracer().start_as_current_span("prepare.spec"):
        spec = job.spec()
        hardware = decide_hardware(spec)
        torch.set_num_threads(int(hardware.threads.value))
    with tracer().start_as_current_span("prepare.data"):
        dataset = read_dataset(spec.data, DataRoots(roots), seed=spec.train.seed, cache=job.path)
        write_atomically(job.findings, json.dumps(dataset.findings.store()).encode())
    with tracer().start_as_current_span("prepare.model"):
        clip = build(spec.model, seed=spec.train.seed)
        decisions = decide(spec, hardware, dataset, clip)
    with tracer().start_as_current_span("prepare.measure"):
        memory_bytes, step_s = _try_out(spec, dataset, clip, decisions)
    for remark in decisions.remarks:
        reporter.notice(remark.code, remark.message, warning=remark.warning)
    reporter.plan(_plan(spec, dataset, clip, decisions, memory_bytes, step_s))


def _plan(
    spec: Spec, dataset: Dataset, clip: Clip, decisions: Decisions, memory_bytes: int, step_s: float
) -> job_pb2.JobPlan:
    """`step_s` is of a whole batch on the CPU."""
    seconds = 0.0
    if decisions.hardware.device.value == "cpu":
        epochs = decisions.total_steps // decisions.steps_per_epoch
        every = spec.evaluation.every_epochs
        evaluations = 2 + (max(epochs - 1, 0) // every if every else 0) if len(dataset.validation) else 0
        images = len(set(dataset.validation.image_ids.tolist()))
        evaluation_s = step_s * _FORWARD_SHARE * images / decisions.batch_size
        seconds = decisions.total_steps * step_s + evaluations * evaluation_s
    captions = {pair.caption for pair in dataset.train.pairs + dataset.validation.pairs}
    return job_pb2.JobPlan(
        device=decisions.hardware.device.value,
        precision=decisions.hardware.precision.value,
        train_samples=len(dataset.train),
        validation_samples=len(dataset.validation),
        distinct_captions=len(captions),
        labels=dataset.labels,
        batch_size=decisions.batch_size,
        steps_per_epoch=decisions.steps_per_epoch,
        total_steps=decisions.total_steps,
        parameters=sum(parameter.numel() for parameter in clip.model.parameters()),
        estimated_memory_bytes=memory_bytes,
        estimated_seconds=seconds,
        decisions=[
            job_pb2.Decision(subject=choice.subject, choice=choice.value, reason=choice.reason)
            for choice in decisions.choices
        ],
        bad_rows=len(dataset.bad),
    )


def _try_out(spec: Spec, dataset: Dataset, clip: Clip, decisions: Decisions) -> tuple[int, float]:
    """Bytes of a step at the full batch size, and its seconds on the CPU: from two small steps on real rows.

    Trains `clip`, which is thrown away.
    """
    pairs = min(decisions.batch_size, _TIMED_PAIRS)
    scale = decisions.batch_size / pairs
    precision = Precision("fp32", "cpu")
    optimizer = build_optimizer(clip.model, learning_rate=1e-6, weight_decay=spec.train.weight_decay)
    step = Step(clip, LOSSES[spec.loss], optimizer, precision, clip_norm=spec.train.clip_norm)
    clip.model.train()
    with Loader(
        dataset.train,
        clip,
        augmentation=spec.data.augmentation,
        batch_size=pairs,
        seed=spec.train.seed,
        max_bad=len(dataset.train),
    ) as loader:
        first, second = loader.batches(0, 2) if loader.steps_per_epoch > 1 else [*loader.batches(0, 1)] * 2
    activations = _activation_bytes(clip, spec, precision, first)
    if decisions.hardware.precision.value != "fp32":
        activations //= 2
    step(first, 0.0)  # allocates the optimizer's state
    began = time.perf_counter()
    step(second, 0.0)
    step_s = (time.perf_counter() - began) * scale
    parameters = sum(parameter.numel() for parameter in clip.model.parameters())
    return round(parameters * _BYTES_PER_PARAMETER + activations * scale), step_s


def _activation_bytes(clip: Clip, spec: Spec, precision: Precision, batch: Batch) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in clip.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        contrastive_loss(clip, LOSSES[spec.loss], precision, batch)
    return sum(kept.values())
