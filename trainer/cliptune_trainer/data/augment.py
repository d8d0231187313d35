"""Training-time changes to an image, before the model's own preprocessing.

Enters: an image and (seed, epoch, row). Leaves: an image. Called where a row is decoded, in whatever thread
or process. The randomness is a pure function of (seed, epoch, row): where the loader stands is then told by
(epoch, batch) alone, and a resumed run draws what the first one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image, ImageOps

# Share of the area and aspect ratio that a crop keeps. Milder than ImageNet's: a caption describes the whole
# image.
CROP_AREA: Final = (0.6, 1.0)
CROP_ASPECT: Final = (3 / 4, 4 / 3)


def augment(image: Image.Image, name: str, *, seed: int, epoch: int, row: int) -> Image.Image:
    """Applies "none", "flip" (left-right, half of the time) or "crop" (a random rectangle)."""
    # Draws come from their own stream (1), apart from the one that orders an epoch.
    return _AUGMENTATIONS[name](image, np.random.default_rng([seed, epoch, row, 1]))


def _flip(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def _crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A rectangle of random area and aspect, as in Szegedy et al. 2015, section 6."""
    area = image.width * image.height * random.uniform(*CROP_AREA)
    aspect = math.exp(random.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
    width = max(min(round(math.sqrt(area * aspect)), image.width), 1)
    height = max(min(round(math.sqrt(area / aspect)), image.height), 1)
    left = int(random.integers(0, image.width - width, endpoint=True))
    top = int(random.integers(0, image.height - height, endpoint=True))
    return image.crop((left, top, left + width, top + height))


_AUGMENTATIONS: Final[dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]]] = {
    "none": lambda image, random: image,
    "flip": _flip,
    "crop": _crop,
}
