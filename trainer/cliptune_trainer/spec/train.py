"""How to optimise: the spec's `[train]`, typed and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from cliptune.v1 import spec_pb2
from cliptune_trainer.schedule import SHAPES
from cliptune_trainer.spec.check import one_of, within, wrong
from cliptune_trainer.spec.resolution import ResolutionConfig, resolution_config

PRECISIONS: Final = ("auto", "fp32", "bf16", "fp16")
ATTENTIONS: Final = ("auto", "sdpa", "sliced", "chunked")
SWITCHES: Final = ("auto", "on", "off")


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
    freeze_image: bool = False
    freeze_text: bool = False
    layer_decay: float = 1.0
    probe_fraction: float = 0.0
    resolution: ResolutionConfig = field(default_factory=ResolutionConfig)

    def __post_init__(self) -> None:
        within("train.epochs", self.epochs, 1, 100_000)
        if self.max_steps is not None:
            within("train.max_steps", self.max_steps, 1, 2**53)
        if self.batch_size is not None:
            within("train.batch_size", self.batch_size, 2, 1_048_576)
        if self.learning_rate is not None:
            check_learning_rate(self.learning_rate)
        within("train.weight_decay", self.weight_decay, 0.0, 10.0)
        within("train.warmup_fraction", self.warmup_fraction, 0.0, 1.0)
        one_of("train.schedule", self.schedule, tuple(SHAPES))
        within("train.clip_norm", self.clip_norm, 0.0, math.inf)
        one_of("train.precision", self.precision, PRECISIONS)
        within("train.progress_every_steps", self.progress_every_steps, 1, 1_000_000)
        one_of("train.attention", self.attention, ATTENTIONS)
        one_of("train.checkpointing", self.checkpointing, SWITCHES)
        if self.micro_batch_size is not None:
            within("train.micro_batch_size", self.micro_batch_size, 1, 1_048_576)
        one_of("train.compile", self.compile, SWITCHES)
        if not 0.0 < self.layer_decay <= 1.0:
            raise wrong("train.layer_decay", f"{self.layer_decay:g}", "above 0, at most 1")
        within("train.probe_fraction", self.probe_fraction, 0.0, 0.9)


def train_config(train: spec_pb2.TrainSpec) -> TrainConfig:
    """The typed form of `TrainSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    return TrainConfig(
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
        freeze_image=train.freeze.image,
        freeze_text=train.freeze.text,
        layer_decay=train.layer_decay if train.HasField("layer_decay") else 1.0,
        probe_fraction=train.probe_fraction,
        resolution=resolution_config(train.resolution),
    )


def check_learning_rate(learning_rate: float, path: str = "train.learning_rate") -> None:
    """Raises `SpecError` unless the learning rate is a finite number above 0 and at most 10."""
    if not (math.isfinite(learning_rate) and 0.0 < learning_rate <= 10.0):
        raise wrong(path, f"{learning_rate:g}", "above 0, at most 10")
