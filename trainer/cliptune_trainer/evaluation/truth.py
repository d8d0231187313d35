"""What images are, by the labels of their rows.

Enters: the rows of a split and the classes. Leaves: which images can be judged, and the classes of each.
Called by `measure`, and while a job is prepared, to say what can be measured at all.

I: distinct images, S: images that are judged, C: classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from cliptune.metric_names import (
    ACCURACY,
    ACCURACY_AT_5,
    AUROC,
    AVERAGE_PRECISION,
    BALANCED_ACCURACY,
)
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.evaluation.metrics import Booleans, Integers
from cliptune_trainer.spec import ClassConfig

TOP: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Truth:
    """Images with their classes.

    Attributes:
        images_S: which distinct image each sample is.
        truth_SC: the classes that it is of.
        alternatives: classes exclude each other: what speaks for one speaks against the others. Otherwise
            each class is judged by itself.
        contradicted: rows of images that alternatives leave out, because their rows name several labels.
    """

    images_S: Integers
    truth_SC: Booleans
    alternatives: bool
    contradicted: tuple[int, ...] = ()

    @classmethod
    def of(cls, pairs: Pairs, classes: Sequence[ClassConfig], *, several_labels: bool) -> Truth:
        """The truth of a split.

        Where classes are alternatives, an image of none of them is left out, and so is one of several. Where
        they are not (`several_labels`, or a class has negative prompts), it is a sample of none, or of all;
        with `several_labels` one without a label is a sample, too.
        """
        places = {entry.label: place for place, entry in enumerate(classes)}
        labels: dict[int, set[str]] = {}
        for pair, image in zip(pairs.pairs, pairs.image_ids.tolist(), strict=True):
            labels.setdefault(image, set()).update(pair.labels)
        alternatives = not several_labels and not any(entry.negative_prompts for entry in classes)
        if alternatives:
            judged = [image for image, found in labels.items() if len(found) == 1 and found <= places.keys()]
        else:
            judged = [image for image, found in labels.items() if found or several_labels]
        truth_SC = np.zeros((len(judged), len(classes)), dtype=np.bool_)
        for sample, image in enumerate(judged):
            truth_SC[sample, [places[label] for label in labels[image] & places.keys()]] = True
        contradicted = [
            pair.row
            for pair, image in zip(pairs.pairs, pairs.image_ids.tolist(), strict=True)
            if alternatives and len(labels[image]) > 1
        ]
        return cls(
            images_S=np.array(judged, dtype=np.int64),
            truth_SC=truth_SC,
            alternatives=alternatives,
            contradicted=tuple(contradicted),
        )

    def __len__(self) -> int:
        return len(self.images_S)

    @property
    def one_each(self) -> bool:
        """Every image is of exactly one class, so that a single answer is right or wrong."""
        return self.truth_SC.shape[1] > 1 and len(self) > 0 and bool((self.truth_SC.sum(axis=1) == 1).all())

    def readable(self, readable_I: Booleans) -> Truth:
        """Without the images that cannot be opened."""
        kept_S = readable_I[self.images_S]
        return replace(self, images_S=self.images_S[kept_S], truth_SC=self.truth_SC[kept_S])

    def measurable(self) -> frozenset[str]:
        """Names of the metrics that can be told."""
        found: set[str] = set()
        positives_C = self.truth_SC.sum(axis=0)
        if ((positives_C > 0) & (positives_C < len(self))).any():
            found |= {AUROC, AVERAGE_PRECISION}
        if self.one_each:
            found |= {ACCURACY, BALANCED_ACCURACY}
            if self.truth_SC.shape[1] >= TOP:
                found.add(ACCURACY_AT_5)
        return frozenset(found)
