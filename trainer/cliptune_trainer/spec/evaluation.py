"""How to measure: the spec's `[evaluation]`, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from cliptune.metric_names import MAIN_METRICS
from cliptune.spec_shape import LABEL_PLACE
from cliptune.v1 import spec_pb2
from cliptune_trainer.spec.check import one_of, within, wrong
from cliptune_trainer.spec.resolution import LARGEST_SIDE

DEFAULT_TEMPLATES: Final = (f"a photo of a {LABEL_PLACE}",)
DEFAULT_BOOTSTRAP_SAMPLES: Final = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassConfig:
    """A class for zero-shot metrics: a label and the prompts that stand for it.

    With `negative_prompts`, said of an image without it, the class is judged by itself.
    """

    label: str
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How to measure."""

    classes: tuple[ClassConfig, ...] = ()
    every_epochs: int = 1
    batch_size: int = 64
    prompt_templates: tuple[str, ...] = DEFAULT_TEMPLATES
    label_names: Mapping[str, str] = field(default_factory=dict)
    main_metric: str = ""  # chosen by what can be measured
    bootstrap_samples: int = DEFAULT_BOOTSTRAP_SAMPLES
    resolutions: tuple[int, ...] = ()  # those that the model was trained at, if several
    latency_budget_ms: float = 0.0  # none
    degradations: bool | None = None  # with a sweep

    def __post_init__(self) -> None:
        within("evaluation.every_epochs", self.every_epochs, 0, 1_000_000)
        within("evaluation.batch_size", self.batch_size, 1, 65_536)
        within("evaluation.bootstrap_samples", self.bootstrap_samples, 0, 100_000)
        for place, side in enumerate(self.resolutions):
            within(f"evaluation.resolutions[{place}]", side, 1, LARGEST_SIDE)
        if any(low >= high for low, high in pairwise(self.resolutions)):
            raise wrong("evaluation.resolutions", f"{list(self.resolutions)}", "sizes that rise, each once")
        within("evaluation.latency_budget_ms", self.latency_budget_ms, 0.0, 1e6)
        if self.main_metric:
            one_of("evaluation.main_metric", self.main_metric, MAIN_METRICS)
        for place, template in enumerate(self.prompt_templates):
            if LABEL_PLACE not in template:
                path = f"evaluation.prompt_templates[{place}]"
                raise wrong(path, repr(template), f"a text with {LABEL_PLACE} in it")
        labels = [entry.label for entry in self.classes]
        alone = len(labels) == 1 and not self.classes[0].negative_prompts
        if alone or len(set(labels)) < len(labels) or "" in labels:
            raise wrong(
                "evaluation.classes",
                f"labelled {labels}",
                "at least two classes, each with a label of its own; or one with negative_prompts",
            )

    def prompts_of(self, label: str) -> tuple[str, ...]:
        """The prompts of a class that has none of its own: its label, or its name, in every template."""
        name = self.label_names.get(label, label)
        return tuple(template.replace(LABEL_PLACE, name) for template in self.prompt_templates)


def evaluation_config(evaluation: spec_pb2.EvaluationSpec) -> EvaluationConfig:
    """The typed form of `EvaluationSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    has = evaluation.HasField
    ways = EvaluationConfig(
        every_epochs=evaluation.every_epochs if has("every_epochs") else 1,
        batch_size=evaluation.batch_size if has("batch_size") else 64,
        prompt_templates=tuple(evaluation.prompt_templates) or DEFAULT_TEMPLATES,
        label_names=dict(evaluation.label_names),
        main_metric=evaluation.main_metric,
        bootstrap_samples=(
            evaluation.bootstrap_samples if has("bootstrap_samples") else DEFAULT_BOOTSTRAP_SAMPLES
        ),
        resolutions=tuple(evaluation.resolutions),
        latency_budget_ms=evaluation.latency_budget_ms,
        degradations=evaluation.degradations if has("degradations") else None,
    )
    return replace(ways, classes=_classes(evaluation.classes, ways))


def _classes(classes: Sequence[spec_pb2.ClassPrompts], ways: EvaluationConfig) -> tuple[ClassConfig, ...]:
    return tuple(
        ClassConfig(
            label=entry.label,
            prompts=tuple(entry.prompts) or ways.prompts_of(entry.label),
            negative_prompts=tuple(entry.negative_prompts),
        )
        for entry in classes
    )
