"""Images as another sensor might give them: out of focus, or of fewer pixels.

Enters: the pixels that a model would see. Leaves: pixels of the same size. Called by evaluation, to tell how
much a model depends on how sharp its images are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeAlias

import numpy as np
from PIL import Image, ImageFilter

from cliptune_trainer.data.loading.decode import Pixels

Degrade: TypeAlias = Callable[[Pixels], Pixels]


def blurred(pixels_HW3: Pixels, *, radius: float) -> Pixels:
    """Out of focus: Gaussian, its standard deviation in pixels of what the model sees."""
    image = Image.fromarray(pixels_HW3).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, dtype=np.uint8).reshape(pixels_HW3.shape)


def resampled(pixels_HW3: Pixels, *, factor: int) -> Pixels:
    """From a sensor of 1/`factor` of the pixels a side: averaged down, then bicubic up again."""
    image = Image.fromarray(pixels_HW3)
    small = (max(image.width // factor, 1), max(image.height // factor, 1))
    down = image.resize(small, Image.Resampling.BOX)
    up = down.resize(image.size, Image.Resampling.BICUBIC)
    return np.asarray(up, dtype=np.uint8).reshape(pixels_HW3.shape)


DEGRADATIONS: Final[Mapping[str, Degrade]] = {
    "blur_1px": partial(blurred, radius=1.0),
    "blur_2px": partial(blurred, radius=2.0),
    "resampled_2x": partial(resampled, factor=2),
    "resampled_4x": partial(resampled, factor=4),
}
