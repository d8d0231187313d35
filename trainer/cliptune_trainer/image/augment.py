"""Random changes to training images: which are allowed, and what is drawn for one row.

Enters: the spec's wishes; then (seed, epoch, row). Leaves: a `View` of an image, carried out where it is
decoded, and a mix of its colours, carried out on the device (`images`). What is drawn is a pure function of
what enters: where the loader stands is then told by (epoch, batch) alone, and a resumed run draws what the
first one would have drawn, however many processes decode. Imports no torch.

N: rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from PIL import Image

Draws: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # [N, draws]
Mixes: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]  # [N, 3, 4]

# What a crop may do to the proportions of a picture, either way.
_CROP_STRETCH: Final = 4 / 3
# Brightness, chroma in two axes (the NTSC's): grey has none, and turning it changes the hue alone.
_YIQ_OF_RGB_33: Final = np.array(
    [
        [0.299, 0.587, 0.114],
        [0.595716, -0.274453, -0.321263],
        [0.211456, -0.522591, 0.311135],
    ]
)
_RGB_OF_YIQ_33: Final = np.linalg.inv(_YIQ_OF_RGB_33)
GREY: Final[tuple[float, float, float]] = (0.299, 0.587, 0.114)

_SPLITMIX_STEP: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How one row shows its image this time.

    Attributes:
        left, top, width, height: the part that is seen, as shares of the image's sides.
        degrees: it is turned by so much counter-clockwise, about its middle.
        quarters: then by so many quarter turns,
        mirror, flip: then left and right, top and bottom change places.
    """

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0
    degrees: float = 0.0
    quarters: int = 0
    mirror: bool = False
    flip: bool = False

    def box(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) in pixels of an image of this size; None: all of it."""
        if self.width == self.height == 1.0:
            return None
        box_w, box_h = math.ceil(self.width * width), math.ceil(self.height * height)
        left, top = round(self.left * (width - box_w)), round(self.top * (height - box_h))
        return left, top, left + box_w, top + box_h

    def settled(self, image: Image.Image) -> Image.Image:
        """Quarter turns and flips, exact to the bit."""
        if self.quarters:
            image = image.transpose(_QUARTERS[self.quarters])
        if self.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return image


WHOLE: Final = View()
_QUARTERS: Final = {
    1: Image.Transpose.ROTATE_90,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What may be done to training images. Defaults: nothing.

    Attributes:
        flip_horizontal, flip_vertical: in half of the cases.
        rotate_quarter: by 0, 90, 180 or 270 degrees.
        rotate_degrees: by any angle of at most so many degrees either way. Where the turned picture reaches
            beyond the image, the image's border is repeated.
        crop_min_area: a crop keeps at least this share of the area, and of each side; 1: no crop.
        brightness, contrast, saturation: multiplied by 1 ± up to this.
        hue: turned by ± up to this share of the circle.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    rotate_quarter: bool = False
    rotate_degrees: float = 0.0
    crop_min_area: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether pixels change places."""
        return (
            self.flip_horizontal
            or self.flip_vertical
            or self.rotate_quarter
            or self.rotate_degrees > 0
            or self.crop_min_area < 1
        )

    @property
    def colours(self) -> bool:
        """Whether pixels change colour."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    def scaled(self, share: float) -> Augmentation:
        """Milder ones: everything that has a size at `share` of it; flips and quarter turns stay as they
        are."""
        if share == 1:
            return self
        return replace(
            self,
            rotate_degrees=share * self.rotate_degrees,
            crop_min_area=1 - share * (1 - self.crop_min_area),
            brightness=share * self.brightness,
            contrast=share * self.contrast,
            saturation=share * self.saturation,
            hue=share * self.hue,
        )

    def view(self, seed: int, epoch: int, row: int) -> View:
        """How a row shows its image in an epoch.

        The crop's area is uniform in [`crop_min_area`, 1] and the logarithm of its proportions, relative to
        the image's own, uniform within a factor of 4/3 (after Szegedy et al. 2015, section 6), narrowed so
        that no side loses a larger share than the area may.
        """
        if not self.moves:
            return WHOLE
        area_u, stretch_u, left, top, turn_u, quarter_u, mirror_u, flip_u = draws(
            seed, epoch, [row], stream=1, count=8
        )[0].tolist()
        area = self.crop_min_area + (1 - self.crop_min_area) * area_u
        stretch = min(1 / area, _CROP_STRETCH) ** (2 * stretch_u - 1)
        return View(
            left=left,
            top=top,
            width=min(math.sqrt(area * stretch), 1.0),
            height=min(math.sqrt(area / stretch), 1.0),
            degrees=self.rotate_degrees * (2 * turn_u - 1),
            quarters=int(4 * quarter_u) if self.rotate_quarter else 0,
            mirror=self.flip_horizontal and mirror_u < 0.5,
            flip=self.flip_vertical and flip_u < 0.5,
        )

    def mixes(self, seed: int, epoch: int, rows: Sequence[int]) -> Mixes:
        """What each channel becomes: so much of red, green, blue and of the image's mean grey, [N, 3, 4].

        Brightness, contrast (away from the mean grey), saturation (away from each pixel's grey), hue: one
        after another they are one matrix and one share of grey. The first three are torchvision's
        ColorJitter's; the hue is turned in YIQ, which keeps the brightness.
        """
        signed_N4 = 2 * draws(seed, epoch, rows, stream=3, count=4) - 1
        bright_N, contrast_N, chroma_N, hue_N = (
            signed_N4 * [self.brightness, self.contrast, self.saturation, self.hue]
        ).T
        bright_N, contrast_N, chroma_N = 1 + bright_N, 1 + contrast_N, 1 + chroma_N
        along_N = chroma_N * np.cos(2 * np.pi * hue_N)
        across_N = chroma_N * np.sin(2 * np.pi * hue_N)
        yiq_N33 = np.zeros((len(rows), 3, 3))
        yiq_N33[:, 0, 0] = 1
        yiq_N33[:, 1, 1] = yiq_N33[:, 2, 2] = along_N
        yiq_N33[:, 1, 2], yiq_N33[:, 2, 1] = -across_N, across_N
        mixes_N34 = np.empty((len(rows), 3, 4), dtype=np.float32)
        mixes_N34[:, :, :3] = (bright_N * contrast_N)[:, None, None] * (
            _RGB_OF_YIQ_33 @ yiq_N33 @ _YIQ_OF_RGB_33
        )
        mixes_N34[:, :, 3] = (bright_N * (1 - contrast_N))[:, None]
        return mixes_N34


NONE: Final = Augmentation()
# `data.augmentation` in one word.
NAMED: Final = {
    "none": NONE,
    "flip": Augmentation(flip_horizontal=True),
    "crop": Augmentation(crop_min_area=0.6),
}


def draws(seed: int, epoch: int, rows: Sequence[int], *, stream: int, count: int) -> Draws:
    """Numbers in [0, 1) that belong to (seed, epoch, row), [N, count].

    SplitMix64 (Steele et al. 2014, figure 17) read at the places row × count, row × count + 1, ...: rows are
    drawn alone, in any order, or all at once, and are the same.
    """
    (key,) = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)
    places_NC = np.asarray(rows, dtype=np.uint64)[:, None] * np.uint64(count) + np.arange(
        1, count + 1, dtype=np.uint64
    )
    mixed_NC = key + places_NC * _SPLITMIX_STEP
    mixed_NC = (mixed_NC ^ (mixed_NC >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_NC = (mixed_NC ^ (mixed_NC >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_NC ^= mixed_NC >> np.uint64(31)
    uniform_NC: Draws = (mixed_NC >> np.uint64(11)) * 2.0**-53
    return uniform_NC
