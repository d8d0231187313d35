"""What the model can do on the validation rows: zero-shot classification and retrieval.

Enters: a `Clip` and the validation split. Leaves: a `Measurement`. Called by the loop before, during and
after training and on command. Everything is computed in fp32 over the whole split at once, so that the
numbers do not depend on the batch size.

I: distinct images, T: distinct captions, C: classes, N: labelled images, D: embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from cliptune.errors import CliptuneError
from cliptune_model.clip import Clip
from cliptune_model.similarity import normalise
from cliptune_model.zero_shot import class_embeddings
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.decode import Decoder, Pixels, thread_pool
from cliptune_trainer.data.images import Normalisation
from cliptune_trainer.data.reading import Reading
from cliptune_trainer.data.source import ImageSource
from cliptune_trainer.metrics import (
    DECIMALS,
    Floats,
    Integers,
    accuracy,
    auroc_one_vs_rest,
    balanced_accuracy,
    best_ranks,
    recall_at,
)
from cliptune_trainer.spec import ClassConfig

RECALLS: Final = (1, 5, 10)
# Rows of the similarity matrix held at once.
_QUERIES: Final = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Metrics by name and the number of images behind them; `unreadable` ones could not be opened."""

    metrics: dict[str, float]
    samples: int
    unreadable: int


class EvaluationInterrupted(Exception):  # noqa: N818 - not an error
    """An instruction that ends the attempt came first; nothing was measured."""


def evaluate(
    clip: Clip,
    pairs: Pairs,
    classes: Sequence[ClassConfig],
    *,
    batch_size: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Measures retrieval over all rows, and zero-shot classification over those whose label is a class.

    Args:
        clip: the model; its mode is restored afterwards.
        pairs: the validation split, not empty.
        classes: two or more, or none: then there are no "zero_shot/" metrics.
        batch_size: images or texts in one forward pass; changes the speed only.
        interrupted: asked between forward passes.

    Raises:
        EvaluationInterrupted: `interrupted` said so.
    """
    # The first row of each image and of each caption stands for it.
    _, image_rows = np.unique(pairs.image_ids, return_index=True)
    _, caption_rows = np.unique(pairs.caption_ids, return_index=True)
    with _evaluation_mode(clip.model):
        images_ID, readable_I = _embed_images(
            clip, [pairs.pairs[row].image for row in image_rows], pairs.reading, batch_size, interrupted
        )
        texts_TD = _embed_texts(
            clip, [pairs.pairs[row].caption for row in caption_rows], batch_size, interrupted
        )
        metrics = _retrieval(images_ID, texts_TD, pairs, readable_I) if readable_I.any() else {}
        if len(classes) > 1:
            prompts = [(entry.label, entry.prompts) for entry in classes]
            classes_CD = _numbers(class_embeddings(clip, prompts, batch_size))
            metrics |= _zero_shot(
                images_ID, classes_CD, pairs, [entry.label for entry in classes], clip.logit_scale, readable_I
            )
    return Measurement(metrics=metrics, samples=int(readable_I.sum()), unreadable=int((~readable_I).sum()))


def _zero_shot(
    images_ID: Floats,
    classes_CD: Floats,
    pairs: Pairs,
    labels: list[str],
    logit_scale: float,
    readable_I: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> dict[str, float]:
    places = {label: place for place, label in enumerate(labels)}
    samples = sorted(
        {
            (int(image), places[pair.label])
            for pair, image in zip(pairs.pairs, pairs.image_ids, strict=True)
            if pair.label in places and readable_I[image]
        }
    )
    if not samples:
        return {}
    images_N, truth_N = (np.array(column, dtype=np.int64) for column in zip(*samples, strict=True))
    similarity_NC = np.round(images_ID[images_N] @ classes_CD.T, DECIMALS)
    predicted_N = similarity_NC.argmax(axis=1)
    metrics = {
        "zero_shot/accuracy": accuracy(truth_N, predicted_N),
        "zero_shot/balanced_accuracy": balanced_accuracy(truth_N, predicted_N),
        "zero_shot/auroc": auroc_one_vs_rest(truth_N, logit_scale * similarity_NC),
    }
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def _retrieval(
    images_ID: Floats,
    texts_TD: Floats,
    pairs: Pairs,
    readable_I: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> dict[str, float]:
    """Recall both ways: a caption's positives are all its images, an image's all its captions."""
    kept = readable_I[pairs.image_ids]
    captions_by_image: dict[int, list[int]] = {}
    images_by_caption: dict[int, list[int]] = {}
    for image, caption in zip(pairs.image_ids[kept].tolist(), pairs.caption_ids[kept].tolist(), strict=True):
        captions_by_image.setdefault(image, []).append(caption)
        images_by_caption.setdefault(caption, []).append(image)
    directions = {
        "image_to_text": _ranks(images_ID, texts_TD, captions_by_image),
        "text_to_image": _ranks(texts_TD, images_ID, images_by_caption),
    }
    return {
        f"retrieval/{direction}_recall@{k}": recall_at(ranks_Q, k)
        for direction, ranks_Q in directions.items()
        for k in RECALLS
    }


def _ranks(queries_D: Floats, candidates_KD: Floats, positives: dict[int, list[int]]) -> Integers:
    asked = sorted(positives)
    ranks = []
    for start in range(0, len(asked), _QUERIES):
        part = asked[start : start + _QUERIES]
        scores_QK = np.round(queries_D[part] @ candidates_KD.T, DECIMALS)
        scores_QK[np.isnan(scores_QK)] = -np.inf  # an image that cannot be read is no candidate
        positive_QK = np.zeros(scores_QK.shape, dtype=np.bool_)
        for place, query in enumerate(part):
            positive_QK[place, positives[query]] = True
        ranks.append(best_ranks(scores_QK, positive_QK))
    return np.concatenate(ranks)


@torch.no_grad()
def _embed_images(
    clip: Clip,
    images: Sequence[ImageSource],
    reading: Reading,
    batch_size: int,
    interrupted: Callable[[], bool],
) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Unit embeddings [I, D]; NaN and not readable where the file cannot be opened any more."""
    embeddings_ID = np.full((len(images), clip.embedding_dim), np.nan)
    readable_I = np.zeros(len(images), dtype=np.bool_)
    decoder = Decoder.of(clip.preprocess_config, reading=reading)
    normalise_pixels = Normalisation.of(clip.preprocess_config, clip.device)
    with thread_pool() as pool:
        starts = range(0, len(images), batch_size)
        parts = [range(len(images))[start : start + batch_size] for start in starts]
        upcoming = [pool.submit(_open, decoder, images[place]) for place in parts[0]] if parts else []
        for number, part in enumerate(parts):
            _check(interrupted)
            decoding = upcoming
            following = parts[number + 1] if number + 1 < len(parts) else range(0)
            upcoming = [pool.submit(_open, decoder, images[place]) for place in following]
            opened = [(place, future.result()) for place, future in zip(part, decoding, strict=True)]
            found = [(place, pixels) for place, pixels in opened if pixels is not None]
            if found:
                places = [place for place, _ in found]
                pixels_BHW3 = torch.from_numpy(np.stack([pixels for _, pixels in found]))
                embeddings_ID[places] = _numbers(clip.encode_images(normalise_pixels(pixels_BHW3)))
                readable_I[places] = True
    return embeddings_ID, readable_I


@torch.no_grad()
def _embed_texts(
    clip: Clip, texts: Sequence[str], batch_size: int, interrupted: Callable[[], bool]
) -> Floats:
    parts = []
    for start in range(0, len(texts), batch_size):
        _check(interrupted)
        tokens_BL = clip.tokenize_trimmed(texts[start : start + batch_size])
        parts.append(_numbers(clip.encode_texts(tokens_BL.to(clip.device))))
    return np.concatenate(parts)


def _numbers(embeddings_D: Tensor) -> Floats:
    """Unit vectors, normalised on the device in fp32, as float64 on the CPU."""
    return normalise(embeddings_D).cpu().numpy().astype(np.float64)


def _open(decoder: Decoder, image: ImageSource) -> Pixels | None:
    try:
        return decoder(image)
    except (CliptuneError, OSError):
        return None


def _check(interrupted: Callable[[], bool]) -> None:
    if interrupted():
        raise EvaluationInterrupted


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
