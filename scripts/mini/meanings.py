"""What images may mean, as vectors: the captions of pictures, of ImageNet's classes, and many other words.

Enters: pictures, classes, the lexicon and the teacher. Leaves: `Meanings`, on the device, in the centred
space that both towers are taught. Called by the image steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.mini.classes import ImageClass, image_classes
from scripts.mini.pictures import Picture
from scripts.mini.sentences import Lexicon, with_article
from scripts.mini.teacher import Teacher, centred

WORDS: Final = 8000
_CAPTIONS_EACH: Final = 4
_EVERY: Final = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Meanings:
    """Vectors of unit length.

    Attributes:
        all_MD: every meaning: what an image is told apart from.
        of_picture_N4: rows of `all_MD` for each picture's captions, repeated to four.
        of_class_KD: one vector a class, the mean over its captions.
        mean_D: what was subtracted before.
    """

    all_MD: Tensor
    of_picture_N4: Tensor
    of_class_KD: Tensor
    mean_D: Tensor


def caption_mean(lexicon: Lexicon, teacher: Teacher) -> Tensor:
    """[D], of captions taken evenly from the training pictures' and the classes'."""
    return teacher.embed(lexicon.captions[::_EVERY]).mean(0)


def collect(pictures: Sequence[Picture], lexicon: Lexicon, teacher: Teacher, mean_D: Tensor) -> Meanings:
    """Embed all of them; pictures that are held out lend no words."""
    classes = image_classes()
    words = random.Random(0).sample(lexicon.visible, min(WORDS, len(lexicon.visible)))
    said = [caption for picture in pictures for caption in picture.captions]
    rows = {text: row for row, text in enumerate(dict.fromkeys([*said, *map(with_article, words)]))}
    all_MD = centred(teacher.embed(list(rows)), mean_D)
    picks = [
        [rows[picture.captions[index % len(picture.captions)]] for index in range(_CAPTIONS_EACH)]
        for picture in pictures
    ]
    return Meanings(
        all_MD=all_MD,
        of_picture_N4=torch.tensor(picks, device=all_MD.device),
        of_class_KD=_class_vectors(classes, teacher, mean_D),
        mean_D=mean_D,
    )


def _class_vectors(classes: Sequence[ImageClass], teacher: Teacher, mean_D: Tensor) -> Tensor:
    captions = [caption for one in classes for caption in one.captions]
    owner = [index for index, one in enumerate(classes) for _ in one.captions]
    vectors = centred(teacher.embed(captions), mean_D)
    summed = torch.zeros(len(classes), vectors.shape[1], device=vectors.device)
    return F.normalize(summed.index_add(0, torch.tensor(owner, device=vectors.device), vectors), dim=-1)
