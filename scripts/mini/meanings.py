"""What images may mean, as vectors: the captions of pictures, of ImageNet's classes, and many other words.

Enters: pictures, classes, words and the teacher. Leaves: `Meanings`, on the device, in the centred
space that both towers are taught. Called by the image steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.mini.classes import ImageClass, image_classes
from scripts.mini.pictures import Picture
from scripts.mini.sentences import Lexicon, with_article
from scripts.mini.teacher import Teacher, centred
from scripts.mini.towers import widened

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
        general_GD: more general names.
        general_share_KG: how often each stands for a class; zeros where a class has none.
    """

    all_MD: Tensor
    of_picture_N4: Tensor
    of_class_KD: Tensor
    general_GD: Tensor
    general_share_KG: Tensor

    def class_table(self, share: float, generator: torch.Generator) -> Tensor:
        """[K, D]: for a `share` of the classes, drawn anew, one of their more general names."""
        has_K = self.general_share_KG.sum(1) > 0
        drawn_K = torch.multinomial(self.general_share_KG + ~has_K[:, None], 1, generator=generator)[:, 0]
        chance_K = torch.rand(len(has_K), generator=generator, device=has_K.device)
        return torch.where(((chance_K < share) & has_K)[:, None], self.general_GD[drawn_K], self.of_class_KD)


def write_words(lexicon: Lexicon, path: Path) -> None:
    """A sample of the nouns that pictures can show, with articles."""
    words = random.Random(0).sample(lexicon.visible, min(WORDS, len(lexicon.visible)))
    path.write_text(json.dumps([with_article(word) for word in words]), encoding="utf-8")


def caption_mean(lexicon: Lexicon, teacher: Teacher) -> Tensor:
    """[D], of captions taken evenly from the training pictures' and the classes'."""
    return teacher.embed(lexicon.captions[::_EVERY]).mean(0)


def collect(
    pictures: Sequence[Picture],
    words: Sequence[str],
    general: Sequence[Sequence[str]],
    teacher: Teacher,
    mean_D: Tensor,
) -> Meanings:
    """Embed all of them; the pictures' captions, the held-out pictures' too, and the words are told apart."""
    classes = image_classes()
    said = [caption for picture in pictures for caption in picture.captions]
    rows = {text: row for row, text in enumerate(dict.fromkeys([*said, *words]))}
    all_MD = widened(centred(teacher.embed(list(rows)), mean_D))
    picks = [
        [rows[picture.captions[index % len(picture.captions)]] for index in range(_CAPTIONS_EACH)]
        for picture in pictures
    ]
    general_names = sorted({name for found in general for name in found})
    return Meanings(
        all_MD=all_MD,
        of_picture_N4=torch.tensor(picks, device=all_MD.device),
        of_class_KD=_class_vectors(classes, teacher, mean_D),
        general_GD=widened(centred(teacher.embed(general_names), mean_D)),
        general_share_KG=_general_shares(general, general_names).to(all_MD.device),
    )


def _general_shares(general: Sequence[Sequence[str]], names: Sequence[str]) -> Tensor:
    """[K, G]: the fewer classes share a name, the oftener it is used for them."""
    row = {name: index for index, name in enumerate(names)}
    of_class_KG = torch.zeros(len(general), len(names))
    for index, found in enumerate(general):
        of_class_KG[index, [row[name] for name in found]] = 1.0
    return of_class_KG / of_class_KG.sum(0).sqrt()


def _class_vectors(classes: Sequence[ImageClass], teacher: Teacher, mean_D: Tensor) -> Tensor:
    captions = [caption for one in classes for caption in one.captions]
    owner = [index for index, one in enumerate(classes) for _ in one.captions]
    vectors = widened(centred(teacher.embed(captions), mean_D))
    summed = torch.zeros(len(classes), vectors.shape[1], device=vectors.device)
    return F.normalize(summed.index_add(0, torch.tensor(owner, device=vectors.device), vectors), dim=-1)
