"""What an evaluation will judge: the classes, and the metric that counts.

Enters: the spec and the data. Leaves: `Judging`, each automatic choice with its reason. Called by `decide`,
before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cliptune.metric_names import AUROC, DIRECTIONS, MAIN_METRICS, recall_name
from cliptune_model.choice import Choice
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.data.listing import rows_listed
from cliptune_trainer.evaluation.truth import Truth
from cliptune_trainer.remark import Remark
from cliptune_trainer.spec import ClassConfig, EvaluationConfig, wrong

_LISTED: Final = 10
_RETRIEVAL: Final = recall_name(DIRECTIONS[0], 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """What is judged. `main_metric` is empty where nothing can be measured."""

    classes: tuple[ClassConfig, ...]
    main_metric: str
    choices: tuple[Choice, ...]
    remarks: tuple[Remark, ...]


def decide_judging(
    config: EvaluationConfig, dataset: Dataset, *, several_labels: bool, insist: bool = True
) -> Judging:
    """Settles the classes and the main metric.

    Raises:
        SpecError: no label of the data is among the spec's classes, or its main metric cannot be measured and
            the job insists on it.
    """
    choices: list[Choice] = []
    classes = _classes(config, dataset.labels, choices)
    truth = Truth.of(dataset.validation, classes, several_labels=several_labels)
    remarks = _about_labels(config, dataset, classes, truth)
    main_metric = _main_metric(config.main_metric, truth, choices, insist) if len(dataset.validation) else ""
    return Judging(classes=classes, main_metric=main_metric, choices=tuple(choices), remarks=tuple(remarks))


def _classes(config: EvaluationConfig, labels: list[str], choices: list[Choice]) -> tuple[ClassConfig, ...]:
    """The classes of the spec, or one for each label of the data; none if that makes fewer than two."""
    if config.classes:
        known = {entry.label for entry in config.classes}
        if labels and known.isdisjoint(labels):
            raise wrong(
                "evaluation.classes", f"labelled {sorted(known)}", f"labels of the data: {labels[:20]}"
            )
        return config.classes
    if len(labels) < 2:
        return ()
    shown = " and ".join(repr(template) for template in config.prompt_templates)
    reason = f"the labels found in the data, each as {shown}"
    choices.append(Choice(subject="classes", value=", ".join(labels[:20]), reason=reason))
    return tuple(ClassConfig(label=label, prompts=config.prompts_of(label)) for label in labels)


def _about_labels(
    config: EvaluationConfig, dataset: Dataset, classes: tuple[ClassConfig, ...], truth: Truth
) -> list[Remark]:
    known = {entry.label for entry in classes}
    remarks = []
    if known and (unknown := sorted(set(dataset.labels) - known)):
        place = (
            "images labelled {} are left out of the zero-shot metrics"
            if truth.alternatives
            else "of the labels {} zero-shot metrics say nothing"
        )
        told = f"{place.format(unknown[:_LISTED])}: evaluation.classes has no such labels"
        remarks.append(Remark(code="labels-without-class", message=told))
    if classes and truth.contradicted:
        told = (
            f"{rows_listed(truth.contradicted)} give an image several labels: it is left out of the zero-shot"
            " metrics; data.label_separator says that an image may have several"
        )
        remarks.append(Remark(code="labels-contradict", message=told))
    unseen = [
        entry.label for entry, count in zip(classes, truth.truth_SC.sum(axis=0), strict=True) if not count
    ]
    if unseen and len(truth):
        told = f"no validation image is labelled {unseen[:_LISTED]}: these classes cannot be judged"
        remarks.append(Remark(code="classes-without-images", message=told, warning=False))
    if unnamed := sorted(set(config.label_names) - known - set(dataset.labels)):
        told = f"evaluation.label_names names {unnamed[:_LISTED]}, which are no labels here"
        remarks.append(Remark(code="label-names-unused", message=told))
    return remarks


def _main_metric(wanted: str, truth: Truth, choices: list[Choice], insist: bool) -> str:
    measurable = truth.measurable()
    possible = [name for name in MAIN_METRICS if name in measurable or name.startswith("retrieval/")]
    if wanted in possible:
        return wanted
    if wanted and insist:
        raise wrong(
            "evaluation.main_metric",
            f"{wanted!r}, which the labels of the validation rows do not tell",
            ", ".join(possible),
        )
    value, reason = (
        (AUROC, "the validation rows have labels")
        if AUROC in measurable
        else (_RETRIEVAL, "the validation rows have no labels to tell apart")
    )
    choices.append(Choice(subject="main_metric", value=value, reason=reason))
    return value
