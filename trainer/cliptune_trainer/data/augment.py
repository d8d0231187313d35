"""Training-time changes to an image: which rectangle of it is used, and whether it is mirrored.

Enters: (seed, epoch) with a row or with the number of rows. Leaves: a rectangle, drawn where the row is
decoded, or one decision a row, carried out on the device. The randomness is a pure function of what enters:
where the loader stands is then told by (epoch, batch) alone, and a resumed run draws what the first one would
have drawn.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

# Share of the area and aspect ratio that a crop keeps. Milder than ImageNet's: a caption describes the whole
# image.
CROP_AREA: Final = (0.6, 1.0)
CROP_ASPECT: Final = (3 / 4, 4 / 3)


def random_rectangle(
    width: int, height: int, *, seed: int, epoch: int, row: int
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of random area and aspect, as in Szegedy et al. 2015, section 6."""
    # Draws come from their own stream (1), apart from the one that orders an epoch.
    random = np.random.default_rng([seed, epoch, row, 1])
    area = width * height * random.uniform(*CROP_AREA)
    aspect = math.exp(random.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
    crop_w = max(min(round(math.sqrt(area * aspect)), width), 1)
    crop_h = max(min(round(math.sqrt(area / aspect)), height), 1)
    left = int(random.integers(0, width - crop_w, endpoint=True))
    top = int(random.integers(0, height - crop_h, endpoint=True))
    return left, top, left + crop_w, top + crop_h


def mirrored(seed: int, epoch: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of an epoch's rows are flipped left to right: half of them, [rows]."""
    flips: np.ndarray[tuple[int], np.dtype[np.bool_]] = (
        np.random.default_rng([seed, epoch, 3]).random(rows) < 0.5
    )
    return flips
