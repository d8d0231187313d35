"""How to measure: the spec's `[evaluation]`, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass

from cliptune.v1 import spec_pb2
from cliptune_trainer.spec.check import within, wrong


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
        within("evaluation.every_epochs", self.every_epochs, 0, 1_000_000)
        within("evaluation.batch_size", self.batch_size, 1, 65_536)
        labels = [entry.label for entry in self.classes]
        if len(labels) == 1 or len(set(labels)) < len(labels) or "" in labels:
            raise wrong(
                "evaluation.classes",
                f"labelled {labels}",
                "at least two classes, each with a label of its own",
            )


def evaluation_config(evaluation: spec_pb2.EvaluationSpec) -> EvaluationConfig:
    """The typed form of `EvaluationSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    return EvaluationConfig(
        classes=tuple(
            ClassConfig(label=entry.label, prompts=tuple(entry.prompts) or (default_prompt(entry.label),))
            for entry in evaluation.classes
        ),
        every_epochs=evaluation.every_epochs if evaluation.HasField("every_epochs") else 1,
        batch_size=evaluation.batch_size if evaluation.HasField("batch_size") else 64,
    )


def default_prompt(label: str) -> str:
    """The prompt of a class that has none."""
    return f"a photo of a {label}"
