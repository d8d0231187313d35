"""A split's images and texts, embedded and made ready to be compared.

Enters: a `Clip`, images and texts. Leaves: prepared vectors, and a function that scores them as the model's
similarity does. Called by `measure`. Vectors are computed in fp32 on the model's device and compared in fp64
on the CPU, over the whole split, so that the numbers do not depend on the batch size.

I: images, T: texts, P: prepared dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cliptune.errors import CliptuneError
from cliptune_model.clip import Clip
from cliptune_trainer.data.loading.decode import Decoder, Pixels, thread_pool
from cliptune_trainer.data.loading.images import Normalisation
from cliptune_trainer.data.source import ImageSource
from cliptune_trainer.evaluation.degrade import Degrade
from cliptune_trainer.evaluation.metrics import DECIMALS, Booleans, Floats
from cliptune_trainer.image.reading import Reading


class EmbeddedImages(NamedTuple):
    """Prepared vectors [I, P], NaN where the image could not be opened, and which could."""

    vectors_IP: Floats
    readable_I: Booleans


@torch.no_grad()
def embed_images(
    clip: Clip,
    images: Sequence[ImageSource],
    reading: Reading,
    batch_size: int,
    check: Callable[[], None],
    degrade: Degrade | None = None,
) -> EmbeddedImages:
    """Opens and embeds; the next batch is decoded while the towers are at work. `check` may raise."""
    readable_I = np.zeros(len(images), dtype=np.bool_)
    vectors_IP: Floats | None = None
    decoder = Decoder.of(clip.preprocess_config, reading=reading)
    normalise_pixels = Normalisation.of(clip.preprocess_config, clip.device)
    with thread_pool() as pool:
        parts = [
            range(len(images))[start : start + batch_size] for start in range(0, len(images), batch_size)
        ]
        upcoming = (
            [pool.submit(_open, decoder, images[place], degrade) for place in parts[0]] if parts else []
        )
        for number, part in enumerate(parts):
            check()
            decoding = upcoming
            following = parts[number + 1] if number + 1 < len(parts) else range(0)
            upcoming = [pool.submit(_open, decoder, images[place], degrade) for place in following]
            opened = [(place, future.result()) for place, future in zip(part, decoding, strict=True)]
            found = [(place, pixels) for place, pixels in opened if pixels is not None]
            if not found:
                continue
            pixels_BHW3 = torch.from_numpy(np.stack([pixels for _, pixels in found]))
            features_BD = clip.encode_images(normalise_pixels(pixels_BHW3))
            prepared_BP = _numbers(clip.similarity.prepare_images(features_BD))
            if vectors_IP is None:
                vectors_IP = np.full((len(images), prepared_BP.shape[1]), np.nan)
            places = [place for place, _ in found]
            vectors_IP[places] = prepared_BP
            readable_I[places] = True
    if vectors_IP is None:
        vectors_IP = np.full((len(images), clip.embedding_dim), np.nan)
    return EmbeddedImages(vectors_IP=vectors_IP, readable_I=readable_I)


@torch.no_grad()
def embed_texts(clip: Clip, texts: Sequence[str], batch_size: int, check: Callable[[], None]) -> Floats:
    """Prepared vectors [T, P]."""
    parts = []
    for start in range(0, len(texts), batch_size):
        check()
        tokens_BL = clip.tokenize_trimmed(texts[start : start + batch_size])
        parts.append(prepared_texts(clip, clip.encode_texts(tokens_BL.to(clip.device))))
    return np.concatenate(parts)


@torch.no_grad()
def prepared_texts(clip: Clip, features_TD: Tensor) -> Floats:
    """Text features, those of classes among them, made ready: [T, P]."""
    return _numbers(clip.similarity.prepare_texts(features_TD))


class Scorer:
    """The model's similarity of prepared vectors.

    Products are rounded to a millionth of their largest possible size: below that lies rounding noise, which
    depends on the batch size, and ties must not be broken by it. What the similarity makes of equal products
    is equal again.
    """

    def __init__(self, clip: Clip) -> None:
        self._of_products: nn.Module | None = None
        if not clip.similarity.linear:
            self._of_products = deepcopy(clip.similarity).to("cpu", torch.float64)

    @torch.no_grad()
    def __call__(self, left_NP: Floats, right_MP: Floats) -> Floats:
        """[N, M]; NaN where a vector is."""
        products_NM: Floats = left_NP @ right_MP.T
        size = float(np.nanmax(_lengths(left_NP), initial=0.0) * np.nanmax(_lengths(right_MP), initial=0.0))
        # A power of two, so that noise of the size does not move the grid; 1 for unit vectors.
        unit = 2.0 ** math.ceil(math.log2(size) - 0.01) if size > 0 else 1.0
        products_NM = np.round(products_NM / unit, DECIMALS) * unit
        if self._of_products is None:
            return products_NM
        scores: Tensor = self._of_products.of_products(torch.from_numpy(products_NM))  # type: ignore[operator]
        return scores.numpy()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; the mode of before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _numbers(prepared: Tensor) -> Floats:
    return prepared.float().cpu().numpy().astype(np.float64)


def _lengths(vectors_NP: Floats) -> Floats:
    lengths_N: Floats = np.linalg.norm(vectors_NP, axis=1)
    return lengths_N


def _open(decoder: Decoder, image: ImageSource, degrade: Degrade | None) -> Pixels | None:
    try:
        pixels = decoder(image)
        return pixels if degrade is None else degrade(pixels)
    except (CliptuneError, OSError):
        return None
