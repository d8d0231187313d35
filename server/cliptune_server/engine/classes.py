"""The classes of a zero-shot request: their prompts, what is refused, and what scores mean.

Enters: the classes of a request, and scores. Leaves: prompts, or an error; probabilities. Used by
`inference.py`.

Shape suffixes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from cliptune.errors import InvalidInputError
from cliptune.v1 import spec_pb2

DEFAULT_PROMPT: Final = "a photo of a {label}"
MIN_CLASSES: Final = 2

Vector = npt.NDArray[np.float32]


def prompts_of(one: spec_pb2.ClassPrompts) -> list[str]:
    """Its own, or its label in the usual sentence."""
    return list(one.prompts) or [DEFAULT_PROMPT.format(label=one.label)]


def check_judged_together(classes: Sequence[spec_pb2.ClassPrompts]) -> None:
    """What an evaluation does with a class by itself is not what a softmax over classes says."""
    for place, one in enumerate(classes):
        if one.negative_prompts:
            raise InvalidInputError(
                f"classes[{place}] ({one.label!r}) has negative_prompts, which only an evaluation looks at",
                field="classes",
                index=place,
            )


def check_labels(labels: Sequence[str]) -> None:
    """`InvalidInputError` for too few, for a blank one and for one that stands twice."""
    if len(labels) < MIN_CLASSES:
        raise InvalidInputError(
            f"classification needs at least {MIN_CLASSES} classes, and has {len(labels)}", field="classes"
        )
    seen: set[str] = set()
    for place, label in enumerate(labels):
        if not label.strip():
            raise InvalidInputError(f"classes[{place}] has no label", field="classes", index=place)
        if label in seen:
            raise InvalidInputError(f"the label {label!r} stands twice", field="classes", index=place)
        seen.add(label)


def softmax(logits_NC: npt.NDArray[np.float64]) -> Vector:
    """Over the columns that are not NaN."""
    if not logits_NC.size:
        return logits_NC.astype(np.float32)
    lost_N1 = np.isnan(logits_NC).all(axis=1, keepdims=True)
    top_N1 = np.where(lost_N1, 0.0, np.nanmax(np.where(lost_N1, 0.0, logits_NC), axis=1, keepdims=True))
    weights_NC = np.exp(logits_NC - top_N1)
    sum_N1 = np.nansum(weights_NC, axis=1, keepdims=True)
    return (weights_NC / np.where(lost_N1, 1.0, sum_N1)).astype(np.float32)
