"""A few images with what the published model makes of them, as small pictures.

Enters: the model and its validation rows. Leaves: `Examples`. Called by `write`. Numbers are of the whole
split and stand in the evaluation; these are for the eye.

I: images, T: texts, C: classes, P: prepared dimension.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from cliptune.errors import CliptuneError
from cliptune_model.clip import Clip
from cliptune_model.zero_shot import class_embeddings
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.source import ImageSource
from cliptune_trainer.evaluation.embedding import (
    Scorer,
    embed_images,
    embed_texts,
    evaluation_mode,
    prepared_texts,
)
from cliptune_trainer.evaluation.metrics import Floats
from cliptune_trainer.image.reading import Reading
from cliptune_trainer.spec import ClassConfig

_ASKED: Final = 200
_SAMPLES: Final = 12
_SHOWN: Final = 6
_FIRST: Final = 3
_SIDE: Final = 128
_QUALITY: Final = 80
_Any = TypeVar("_Any")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnail:
    """An image as a data URI, and what is said of it."""

    uri: str
    caption: str
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistaken:
    """An image of one class that was taken for another."""

    image: Thumbnail
    taken_for: str
    share: float
    """Probability that the model gave to the wrong class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioned:
    """An image, and the texts that the model finds likest: (text, it is right)."""

    image: Thumbnail
    texts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Illustrated:
    """A text, and the images that the model finds likest: (image, it is right)."""

    text: str
    images: tuple[tuple[Thumbnail, bool], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """What is shown of what the model does. `asked`: validation images among which it was looked for."""

    asked: int = 0
    mistaken: tuple[Mistaken, ...] = ()
    captioned: tuple[Captioned, ...] = ()
    illustrated: tuple[Illustrated, ...] = ()


def samples_of(pairs: Pairs) -> list[Thumbnail]:
    """Images to train on, a few of each label in turn."""
    by_label: dict[str, list[int]] = {}
    for place in _even(len(pairs), 4 * _ASKED):
        by_label.setdefault(pairs.pairs[place].label, []).append(place)
    turns = [
        place for places in zip(*(_padded(one) for one in by_label.values()), strict=True) for place in places
    ]
    shown = [thumbnail(pairs, place) for place in [place for place in turns if place >= 0][:_SAMPLES]]
    return [one for one in shown if one is not None]


def examples_of(clip: Clip, pairs: Pairs, classes: Sequence[ClassConfig], *, batch_size: int) -> Examples:
    """Asks the model about an even sample of the rows, mistakes first: they tell more."""
    rows = [int(row) for row in np.unique(pairs.image_ids, return_index=True)[1]]
    rows = [rows[place] for place in _even(len(rows), _ASKED)]
    texts = list(dict.fromkeys(pairs.pairs[row].caption for row in rows))
    with evaluation_mode(clip.model):
        images = embed_images(
            clip, [pairs.pairs[row].image for row in rows], pairs.reading, batch_size, lambda: None
        )
        kept = np.flatnonzero(images.readable_I)
        if not len(kept):
            return Examples()
        rows = [rows[place] for place in kept]
        images_IP, texts_TP = images.vectors_IP[kept], embed_texts(clip, texts, batch_size, lambda: None)
        classes_CP: Floats | None = None
        if len(classes) > 1:
            prompts = [(entry.label, entry.prompts) for entry in classes]
            classes_CP = prepared_texts(clip, class_embeddings(clip, prompts, batch_size))
    score = Scorer(clip)
    scores_IT = score(images_IP, texts_TP)
    return Examples(
        asked=len(rows),
        mistaken=()
        if classes_CP is None
        else _mistaken(pairs, rows, clip.logit_scale * score(images_IP, classes_CP), classes),
        captioned=_captioned(pairs, rows, scores_IT, texts),
        illustrated=_illustrated(pairs, rows, scores_IT, texts),
    )


def _mistaken(
    pairs: Pairs, rows: Sequence[int], logits_IC: Floats, classes: Sequence[ClassConfig]
) -> tuple[Mistaken, ...]:
    """The surest mistakes, of as many kinds as there are."""
    labels = [entry.label for entry in classes]
    shares_IC = np.exp(logits_IC - logits_IC.max(axis=1, keepdims=True))
    shares_IC /= shares_IC.sum(axis=1, keepdims=True)
    surest: dict[tuple[str, str], tuple[float, int]] = {}
    for place, row in enumerate(rows):
        truth, taken = pairs.pairs[row].labels, labels[int(shares_IC[place].argmax())]
        if truth and taken not in truth and truth[0] in labels:
            share = float(shares_IC[place].max())
            surest[truth[0], taken] = max(surest.get((truth[0], taken), (0.0, row)), (share, row))
    found = sorted(surest.items(), key=lambda item: -item[1][0])[:_SHOWN]
    return tuple(
        Mistaken(image=image, taken_for=taken, share=share)
        for (_, taken), (share, row) in found
        if (image := thumbnail(pairs, row)) is not None
    )


def _captioned(
    pairs: Pairs, rows: Sequence[int], scores_IT: Floats, texts: Sequence[str]
) -> tuple[Captioned, ...]:
    right = _right(pairs)
    found = []
    for place, row in enumerate(rows):
        first = np.argsort(-scores_IT[place], kind="stable")[:_FIRST]
        owned = right[int(pairs.image_ids[row])]
        found.append((row, tuple((texts[text], texts[text] in owned) for text in first)))
    wrong = [one for one in found if not one[1][0][1]]
    good = [one for one in found if one[1][0][1]]
    shown = _some(wrong, _SHOWN // 2) + _some(good, _SHOWN // 2)
    return tuple(
        Captioned(image=image, texts=said)
        for row, said in shown
        if (image := thumbnail(pairs, row)) is not None
    )


def _illustrated(
    pairs: Pairs, rows: Sequence[int], scores_IT: Floats, texts: Sequence[str]
) -> tuple[Illustrated, ...]:
    right = _right(pairs)
    found = []
    for text in _some(list(range(len(texts))), _SHOWN // 2):
        first = np.argsort(-scores_IT[:, text], kind="stable")[:_FIRST]
        images = [
            (image, texts[text] in right[int(pairs.image_ids[rows[place]])])
            for place in first
            if (image := thumbnail(pairs, rows[place])) is not None
        ]
        found.append(Illustrated(text=texts[text], images=tuple(images)))
    return tuple(found)


def _right(pairs: Pairs) -> dict[int, set[str]]:
    captions: dict[int, set[str]] = {}
    for pair, image in zip(pairs.pairs, pairs.image_ids.tolist(), strict=True):
        captions.setdefault(image, set()).add(pair.caption)
    return captions


def thumbnail(pairs: Pairs, row: int) -> Thumbnail | None:
    """A row's image as a small JPEG; None: it cannot be read any more."""
    pair = pairs.pairs[row]
    uri = _data_uri(pair.image, pairs.reading)
    return None if uri is None else Thumbnail(uri=uri, caption=pair.caption, label=", ".join(pair.labels))


def _data_uri(source: ImageSource, reading: Reading) -> str | None:
    try:
        image = reading(source.read_bytes()).image
    except (CliptuneError, OSError):
        return None
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _even(count: int, most: int) -> list[int]:
    """Places, evenly spread, at most so many."""
    return list(range(count)) if count <= most else [place * count // most for place in range(most)]


def _some(found: list[_Any], most: int) -> list[_Any]:
    return [found[place] for place in _even(len(found), most)]


def _padded(places: list[int]) -> list[int]:
    return [*places[:_SAMPLES], *[-1] * (_SAMPLES - len(places))]
