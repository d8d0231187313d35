"""From the bytes of an image to the pixels that the model sees, as bytes.

Enters: a `Request`. Leaves: uint8 [H, W, 3] at the model's size. Called by the loader, in threads or in
processes of its own, and by evaluation. What is left to do, normalising, is exact on any device and is done
there (`images`): a byte a value travels, not four. Imports no torch, so that a decoding process starts
quickly.

H, W: the model's image height and width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from cliptune.errors import CliptuneError
from cliptune_trainer.data.source import ImageSource, Request
from cliptune_trainer.image.augment import NONE, Augmentation, View
from cliptune_trainer.image.geometry import Framing, Geometry
from cliptune_trainer.image.reading import Reading

Pixels: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]  # [H, W, 3]
Bytes4: TypeAlias = np.ndarray[tuple[int, int, int, int], np.dtype[np.uint8]]  # [N, H, W, 3]
_MAX_THREADS: Final = 8
# Of the pixels that a random rectangle needs, the share that may do when a JPEG is decoded at a fraction of
# its size: rectangles of an image of twice the size would mostly miss it by a little.
_CROP_ENOUGH: Final = 0.85


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Opens, crops and resizes an image. Small and picklable.

    Attributes:
        geometry: which part of an image, at what size.
        augmentation: of it, crops, turns and flips are done here; colours are the device's (`Images`).
        seed: of what is drawn.
        exact: as open_clip's evaluation transform, to the bit. Otherwise JPEGs are decoded at a fraction of
            their size where that is enough, and every image is cropped and resized in one pass: photo-like
            images of 640 × 480, read at 224, then differ by one level of 255 on average (46 dB).
        reading: how images that are more than 8-bit RGB become RGB.
    """

    geometry: Geometry
    augmentation: Augmentation = NONE
    seed: int = 0
    exact: bool = True
    reading: Reading = field(default_factory=Reading)

    @classmethod
    def of(
        cls,
        preprocess_config: Mapping[str, Any],
        *,
        augmentation: Augmentation = NONE,
        seed: int = 0,
        exact: bool = True,
        reading: Reading | None = None,
    ) -> Decoder:
        """For a model's `preprocess_config`."""
        return cls(
            geometry=Geometry.of(preprocess_config),
            augmentation=augmentation,
            seed=seed,
            exact=exact,
            reading=reading or Reading(),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.geometry.height, self.geometry.width, 3

    def __call__(self, image: ImageSource, epoch: int = 0, row: int = 0) -> Pixels:
        """Pixels of an image. Raises OSError, `ImageDecodeError` or `ImageSizeError`."""
        encoded = image.read_bytes()
        view = self.augmentation.view(self.seed, epoch, row)
        geometry = self.geometry.aside if view.quarters % 2 else self.geometry
        framed = (_exactly if self.exact else _quickly)(self.reading, encoded, geometry, view)
        pixels: Pixels = np.asarray(view.settled(framed))
        return pixels


def _exactly(reading: Reading, encoded: bytes, geometry: Geometry, view: View) -> Image.Image:
    image = reading(encoded).image
    box = view.box(*image.size)
    if view.degrees:
        return geometry.turned(image, geometry.framing(*image.size, box), 1.0, view.degrees)
    return geometry(image.crop(box) if box else image)


def _quickly(reading: Reading, encoded: bytes, geometry: Geometry, view: View) -> Image.Image:
    framings: list[Framing] = []

    def enough(width: int, height: int) -> tuple[int, int]:
        box = view.box(width, height)
        framings.append(geometry.framing(width, height, box))
        enough_w, enough_h = framings[-1].enough
        return (
            (math.ceil(enough_w * _CROP_ENOUGH), math.ceil(enough_h * _CROP_ENOUGH))
            if box
            else (enough_w, enough_h)
        )

    image, scale = reading.scaled(encoded, enough)
    (width, height) = framings[0].source
    if image.size != (math.ceil(width / scale), math.ceil(height / scale)):
        enough(*image.size)  # the header did not tell the truth, or the format turned the image
        scale = 1.0
    if view.degrees:
        return geometry.turned(image, framings[-1], scale, view.degrees)
    return geometry.framed(image, framings[-1], scale)


def decode_rows(decoder: Decoder, requests: Sequence[Request], pixels_NHW3: Bytes4) -> list[str]:
    """Decodes one image after another into `pixels_NHW3`; for each, why it cannot be read, or ""."""
    return [
        _decode_row(decoder, request, pixels_HW3)
        for request, pixels_HW3 in zip(requests, pixels_NHW3, strict=True)
    ]


def _decode_row(decoder: Decoder, request: Request, pixels_HW3: Pixels) -> str:
    try:
        pixels_HW3[:] = decoder(request.image, request.epoch, request.row)
    except (CliptuneError, OSError) as error:
        return reason(error)
    return ""


def reason(error: CliptuneError | OSError) -> str:
    """What is wrong with an image, for a person. Never empty."""
    if isinstance(error, CliptuneError):
        return error.message or type(error).__name__
    return error.strerror or str(error) or type(error).__name__


def thread_pool() -> ThreadPoolExecutor:
    """Threads that decode: Pillow releases the interpreter's lock."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), thread_name_prefix="decode")
