"""What is drawn together when rows are resampled: images, or the groups that they come in.

Enters: the rows of a split. Leaves: a number for each image and caption; equal numbers are drawn together.
Called by `measure`.

I: distinct images, T: distinct captions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.evaluation.metrics import Integers


class Units(NamedTuple):
    """The unit of each image and of each caption."""

    images_I: Integers
    captions_T: Integers

    @classmethod
    def of(cls, pairs: Pairs) -> Units:
        """An image's group (patient, module, source), or the image itself where it has none.

        A caption belongs to a group whose images alone bear it; one that several groups share stands for
        itself.
        """
        known: dict[tuple[str, str | int], int] = {}

        def number(kind: str, key: str | int) -> int:
            return known.setdefault((kind, key), len(known))

        images: dict[int, int] = {}
        of_caption: dict[int, set[int]] = {}
        for pair, image, caption in zip(
            pairs.pairs, pairs.image_ids.tolist(), pairs.caption_ids.tolist(), strict=True
        ):
            unit = number("group", pair.group) if pair.group else number("image", image)
            of_caption.setdefault(caption, set()).add(images.setdefault(image, unit))
        captions = {
            caption: next(iter(found)) if len(found) == 1 else number("caption", caption)
            for caption, found in of_caption.items()
        }
        return cls(images_I=_in_order(images), captions_T=_in_order(captions))


def _in_order(numbers: dict[int, int]) -> Integers:
    return np.array([numbers[place] for place in range(len(numbers))], dtype=np.int64)
