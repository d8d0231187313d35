"""What the model can do on the validation rows: zero-shot classification and retrieval.

Enters: a `Clip` and the validation split. Leaves: a `Measurement`. Called by the loop before, during and
after training and on command. Everything is computed over the whole split at once.

I: distinct images, T: distinct captions, S: images with classes, C: classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cliptune.evaluation import Interval
from cliptune.metric_names import CALIBRATION_ERROR, DIRECTIONS
from cliptune_model.acceleration.folded import fold
from cliptune_model.clip import Clip
from cliptune_model.zero_shot import class_embeddings
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.evaluation.bootstrap import Statistic, intervals
from cliptune_trainer.evaluation.degrade import Degrade
from cliptune_trainer.evaluation.embedding import (
    EmbeddedImages,
    Scorer,
    embed_images,
    embed_texts,
    evaluation_mode,
    prepared_texts,
)
from cliptune_trainer.evaluation.measurement import EvaluationInterrupted, Measurement
from cliptune_trainer.evaluation.metrics import Floats, Integers
from cliptune_trainer.evaluation.retrieval import Positives, Retrieval, retrieve
from cliptune_trainer.evaluation.truth import Truth
from cliptune_trainer.evaluation.units import Units
from cliptune_trainer.evaluation.zero_shot import ZeroShot
from cliptune_trainer.spec import ClassConfig


def evaluate(
    clip: Clip,
    pairs: Pairs,
    classes: Sequence[ClassConfig],
    *,
    batch_size: int,
    several_labels: bool = False,
    main_metric: str = "",
    bootstrap_samples: int = 0,
    degrade: Degrade | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Measures retrieval over all rows, and zero-shot classification over those with labels.

    Args:
        clip: the model; its mode is restored afterwards.
        pairs: the validation split, not empty.
        classes: to tell apart; none: then there are no "zero_shot/" metrics.
        batch_size: images or texts in one forward pass; changes the speed only.
        several_labels: an image may have several labels, and none.
        main_metric: told as such if it can be measured.
        bootstrap_samples: resamples behind each interval; 0: no intervals.
        degrade: what is done to images, as another sensor would. None: nothing.
        interrupted: asked between forward passes and between blocks of resamples.

    Raises:
        EvaluationInterrupted: `interrupted` said so.
    """

    def check() -> None:
        if interrupted():
            raise EvaluationInterrupted

    # The first row of each image and of each caption stands for it.
    _, image_rows = np.unique(pairs.image_ids, return_index=True)
    _, caption_rows = np.unique(pairs.caption_ids, return_index=True)
    scorer = Scorer(clip)
    with evaluation_mode(clip.model):
        folded, _ = fold(clip)
        images = embed_images(
            folded, [pairs.pairs[row].image for row in image_rows], pairs.reading, batch_size, check, degrade
        )
        texts_TP = embed_texts(clip, [pairs.pairs[row].caption for row in caption_rows], batch_size, check)
        truth = Truth.of(pairs, classes, several_labels=several_labels).readable(images.readable_I)
        zero_shot = _zero_shot(clip, classes, truth, images, scorer, batch_size) if classes else None
    found = _Found(units=Units.of(pairs), resamples=bootstrap_samples, check=check)
    if images.readable_I.any():
        for retrieval in _retrievals(pairs, images, texts_TP, scorer, check):
            found.add(retrieval.metrics, found.unit_of(retrieval))
    if zero_shot is not None:
        found.add(zero_shot.metrics, found.units.images_I[truth.images_S])
        found.add_value(CALIBRATION_ERROR, zero_shot.calibration_error())
    return Measurement(
        metrics=found.metrics,
        samples=int(images.readable_I.sum()),
        unreadable=int((~images.readable_I).sum()),
        main_metric=main_metric if main_metric in found.metrics else "",
        intervals=found.intervals,
        classes=zero_shot.class_scores([entry.label for entry in classes]) if zero_shot else (),
        confusion=zero_shot.confusion() if zero_shot else (),
    )


@dataclass(kw_only=True, slots=True)
class _Found:
    """Values and intervals as they come in."""

    units: Units
    resamples: int
    check: Callable[[], None]
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)

    def add(self, statistic: Statistic, units_N: Integers) -> None:
        for name, value_1 in statistic(np.ones((1, len(units_N)))).items():
            self.add_value(name, float(value_1[0]))
        found = intervals(statistic, units_N, resamples=self.resamples, check=self.check)
        self.intervals |= {name: found[name] for name in found.keys() & self.metrics.keys()}

    def add_value(self, name: str, value: float) -> None:
        if not np.isnan(value):
            self.metrics[name] = value

    def unit_of(self, retrieval: Retrieval) -> Integers:
        asked = self.units.images_I if retrieval.direction == DIRECTIONS[0] else self.units.captions_T
        unit_Q: Integers = asked[retrieval.queries_Q]
        return unit_Q


def _zero_shot(
    clip: Clip,
    classes: Sequence[ClassConfig],
    truth: Truth,
    images: EmbeddedImages,
    scorer: Scorer,
    batch_size: int,
) -> ZeroShot | None:
    if not len(truth):
        return None
    images_SP = images.vectors_IP[truth.images_S]

    def logits(prompts: list[tuple[str, tuple[str, ...]]]) -> Floats:
        classes_CP = prepared_texts(clip, class_embeddings(clip, prompts, batch_size))
        return clip.logit_scale * scorer(images_SP, classes_CP)

    negatives_SC = np.full(truth.truth_SC.shape, np.nan)
    judged_alone = [place for place, entry in enumerate(classes) if entry.negative_prompts]
    if judged_alone:
        negatives_SC[:, judged_alone] = logits(
            [(classes[place].label, classes[place].negative_prompts) for place in judged_alone]
        )
    return ZeroShot.of(truth, logits([(entry.label, entry.prompts) for entry in classes]), negatives_SC)


def _retrievals(
    pairs: Pairs, images: EmbeddedImages, texts_TP: Floats, scorer: Scorer, check: Callable[[], None]
) -> tuple[Retrieval, Retrieval]:
    positives = Positives(pairs, images.readable_I)
    to_text, to_image = DIRECTIONS

    def of_images(queries: Integers) -> Floats:
        return scorer(images.vectors_IP[queries], texts_TP)

    def of_texts(queries: Integers) -> Floats:
        scores: Floats = scorer(images.vectors_IP, texts_TP[queries]).T
        return np.where(np.isnan(scores), -np.inf, scores)  # an image that cannot be read is no candidate

    return (
        retrieve(to_text, of_images, positives.by_image, check),
        retrieve(to_image, of_texts, positives.by_caption, check),
    )
