"""What a job asks for, typed and checked: from the wire's `JobSpec` to frozen dataclasses.

Enters: a `JobSpec` message. Leaves: a `Spec`, every default filled in as `spec.proto` documents it. Called by
`prepare` and `run`. A wrong value is a `SpecError` that names its path and what is allowed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cliptune.errors import SpecError
from cliptune.v1 import spec_pb2
from cliptune_model.source import MAX_CONTEXT, ModelSource
from cliptune_trainer.losses import LOSSES, TILINGS
from cliptune_trainer.schedule import SHAPES

AUGMENTATIONS: Final = ("none", "flip", "crop")
DECODES: Final = ("auto", "exact", "fast")
PRECISIONS: Final = ("auto", "fp32", "bf16", "fp16")
ATTENTIONS: Final = ("auto", "sdpa", "sliced", "chunked")
SWITCHES: Final = ("auto", "on", "off")
_DEVICE: Final = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where image-caption pairs come from."""

    train: str
    validation: str = ""
    image_root: str = ""
    image_column: str = "image"
    caption_column: str = "caption"
    label_column: str = ""
    split_column: str = ""
    group_column: str = ""
    validation_fraction: float = 0.1
    max_bad_fraction: float = 0.01
    augmentation: str = "none"
    workers: int | None = None  # chosen by device, cores and rows
    decode: str = "auto"

    def __post_init__(self) -> None:
        if not self.train:
            raise wrong("data.train", "empty", "a CSV or TSV file with a header row, or tar shards")
        _within("data.validation_fraction", self.validation_fraction, 0.0, 0.9)
        _within("data.max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _one_of("data.augmentation", self.augmentation, AUGMENTATIONS)
        if self.workers is not None:
            _within("data.workers", self.workers, 0, 256)
        _one_of("data.decode", self.decode, DECODES)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to optimise."""

    epochs: int = 5
    max_steps: int | None = None
    batch_size: int | None = None  # 64, or all rows where there are fewer
    learning_rate: float | None = None  # chosen by whether the weights are pretrained
    weight_decay: float = 0.1
    warmup_fraction: float = 0.1
    schedule: str = "cosine"
    clip_norm: float = 1.0
    precision: str = "auto"
    seed: int = 0
    progress_every_steps: int = 1
    attention: str = "auto"
    checkpointing: str = "auto"
    micro_batch_size: int | None = None  # as large as fits
    compile: str = "auto"

    def __post_init__(self) -> None:
        _within("train.epochs", self.epochs, 1, 100_000)
        if self.max_steps is not None:
            _within("train.max_steps", self.max_steps, 1, 2**53)
        if self.batch_size is not None:
            _within("train.batch_size", self.batch_size, 2, 1_048_576)
        if self.learning_rate is not None:
            check_learning_rate(self.learning_rate)
        _within("train.weight_decay", self.weight_decay, 0.0, 10.0)
        _within("train.warmup_fraction", self.warmup_fraction, 0.0, 1.0)
        _one_of("train.schedule", self.schedule, tuple(SHAPES))
        _within("train.clip_norm", self.clip_norm, 0.0, math.inf)
        _one_of("train.precision", self.precision, PRECISIONS)
        _within("train.progress_every_steps", self.progress_every_steps, 1, 1_000_000)
        _one_of("train.attention", self.attention, ATTENTIONS)
        _one_of("train.checkpointing", self.checkpointing, SWITCHES)
        if self.micro_batch_size is not None:
            _within("train.micro_batch_size", self.micro_batch_size, 1, 1_048_576)
        _one_of("train.compile", self.compile, SWITCHES)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassConfig:
    """A class for zero-shot metrics: a label and the prompts that stand for it."""

    label: str
    prompts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How to measure."""

    classes: tuple[ClassConfig, ...] = ()
    every_epochs: int = 1
    batch_size: int = 64

    def __post_init__(self) -> None:
        _within("evaluation.every_epochs", self.every_epochs, 0, 1_000_000)
        _within("evaluation.batch_size", self.batch_size, 1, 65_536)
        labels = [entry.label for entry in self.classes]
        if len(labels) == 1 or len(set(labels)) < len(labels) or "" in labels:
            raise wrong(
                "evaluation.classes",
                f"labelled {labels}",
                "at least two classes, each with a label of its own",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save."""

    every_steps: int | None = None  # the end of every epoch
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            _within("checkpoint.every_steps", self.every_steps, 1, 2**53)
        _within("checkpoint.keep", self.keep, 1, 10_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceConfig:
    """What the job may use."""

    device: str = "auto"
    threads: int | None = None
    memory_gib: float | None = None  # what is free, less a reserve

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise wrong("resources.device", repr(self.device), "auto, cpu, mps, cuda, cuda:N")
        if self.threads is not None:
            _within("resources.threads", self.threads, 1, 4096)
        if self.memory_gib is not None:
            _within("resources.memory_gib", self.memory_gib, 0.125, 65_536)

    @property
    def memory_bytes(self) -> int | None:
        """What the job may use of the device."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A whole job, checked."""

    name: str
    model: ModelSource
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: str = "infonce"
    tiling: str = "auto"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)

    def __post_init__(self) -> None:
        _one_of("loss.name", self.loss, tuple(LOSSES))
        _one_of("loss.tiling", self.tiling, TILINGS)


def from_proto(message: spec_pb2.JobSpec) -> Spec:
    """The typed form of a `JobSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    data, train, evaluation = message.data, message.train, message.evaluation
    checkpoint, resources = message.checkpoint, message.resources
    return Spec(
        name=message.name,
        model=_source(message.model),
        data=DataConfig(
            train=data.train,
            validation=data.validation,
            image_root=data.image_root,
            image_column=data.image_column or "image",
            caption_column=data.caption_column or "caption",
            label_column=data.label_column,
            split_column=data.split_column,
            group_column=data.group_column,
            validation_fraction=data.validation_fraction if data.HasField("validation_fraction") else 0.1,
            max_bad_fraction=data.max_bad_fraction if data.HasField("max_bad_fraction") else 0.01,
            augmentation=data.augmentation or "none",
            workers=data.workers if data.HasField("workers") else None,
            decode=data.decode or "auto",
        ),
        train=TrainConfig(
            epochs=train.epochs if train.HasField("epochs") else 5,
            max_steps=train.max_steps if train.HasField("max_steps") else None,
            batch_size=train.batch_size if train.HasField("batch_size") else None,
            learning_rate=train.learning_rate if train.HasField("learning_rate") else None,
            weight_decay=train.weight_decay if train.HasField("weight_decay") else 0.1,
            warmup_fraction=train.warmup_fraction if train.HasField("warmup_fraction") else 0.1,
            schedule=train.schedule or "cosine",
            clip_norm=train.clip_norm if train.HasField("clip_norm") else 1.0,
            precision=train.precision or "auto",
            seed=train.seed,
            progress_every_steps=train.progress_every_steps if train.HasField("progress_every_steps") else 1,
            attention=train.attention or "auto",
            checkpointing=train.checkpointing or "auto",
            micro_batch_size=train.micro_batch_size if train.HasField("micro_batch_size") else None,
            compile=train.compile or "auto",
        ),
        loss=message.loss.name or "infonce",
        tiling=message.loss.tiling or "auto",
        evaluation=EvaluationConfig(
            classes=tuple(
                ClassConfig(label=entry.label, prompts=tuple(entry.prompts) or (default_prompt(entry.label),))
                for entry in evaluation.classes
            ),
            every_epochs=evaluation.every_epochs if evaluation.HasField("every_epochs") else 1,
            batch_size=evaluation.batch_size if evaluation.HasField("batch_size") else 64,
        ),
        checkpoint=CheckpointConfig(
            every_steps=checkpoint.every_steps if checkpoint.HasField("every_steps") else None,
            keep=checkpoint.keep if checkpoint.HasField("keep") else 2,
        ),
        resources=ResourceConfig(
            device=resources.device or "auto",
            threads=resources.threads if resources.HasField("threads") else None,
            memory_gib=resources.memory_gib if resources.HasField("memory_gib") else None,
        ),
    )


def _source(message: spec_pb2.ModelSpec) -> ModelSource:
    if not message.name.strip():
        raise wrong(
            "model.name",
            "empty",
            "an open_clip architecture, hf-hub:ORG/REPO, local-dir:PATH, a configuration shipped with"
            " cliptune, or registry:NAME",
        )
    context_length = message.context_length if message.HasField("context_length") else None
    if context_length is not None:
        _within("model.context_length", context_length, 1, MAX_CONTEXT)
    return ModelSource(name=message.name, pretrained=message.pretrained, context_length=context_length)


def default_prompt(label: str) -> str:
    """The prompt of a class that has none."""
    return f"a photo of a {label}"


def check_learning_rate(learning_rate: float, path: str = "train.learning_rate") -> None:
    """Raises `SpecError` unless the learning rate is a finite number above 0 and at most 10."""
    if not (math.isfinite(learning_rate) and 0.0 < learning_rate <= 10.0):
        raise wrong(path, f"{learning_rate:g}", "above 0, at most 10")


def wrong(path: str, value: str, allowed: str) -> SpecError:
    """The error for a field of the spec: its path, what it is, and what it may be."""
    return SpecError(f"{path} is {value}; allowed: {allowed}", path=path, allowed=allowed)


def _one_of(path: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise wrong(path, repr(value), ", ".join(allowed))


def _within(path: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        bounds = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
        raise wrong(path, f"{value:g}", bounds)
