"""Which part of an image a model sees, and at what size: open_clip's evaluation transform up to its pixels.

Enters: an RGB image. Leaves: an RGB image of the model's input size; what is left to do (scaling to [0, 1]
and normalising) is exact on any device. Called by the decoder. Written with Pillow alone, so that a decoding
process need not import torch; the tests hold it equal to open_clip's transform, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Size: TypeAlias = tuple[int, int]  # width, height in pixels

# A strip of extreme aspect would be enlarged to gigabytes before most of it is cut off: beyond this many
# pixels only the part that is kept is made.
_MAX_RESIZED_PIXELS: Final = 50_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """The one resize that makes a model's input: `box` of an image of `source` pixels becomes `size` pixels
    at `place`.

    `enough`: the least size of the whole image at which `box` still has `size` pixels.
    """

    source: Size
    box: Box
    size: Size
    place: Size
    enough: Size


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """open_clip's "shortest" (resize the short side, cut the middle out), "longest" (resize the long side,
    fill the rest) or "squash"."""

    width: int
    height: int
    mode: str = "shortest"
    resample: Image.Resampling = Image.Resampling.BICUBIC
    fill: int = 0

    @classmethod
    def of(cls, preprocess_config: Mapping[str, Any]) -> Geometry:
        """From open_clip's form, every field given."""
        size = preprocess_config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        mode = preprocess_config["resize_mode"] or "shortest"
        bilinear = preprocess_config["interpolation"] == "bilinear"
        if mode == "shortest" and height != width:
            bilinear = False  # open_clip resizes these bicubically, whatever the configuration says
        return cls(
            width=int(width),
            height=int(height),
            mode=mode,
            resample=Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC,
            fill=int(preprocess_config["fill_color"] or 0),
        )

    @property
    def aside(self) -> Geometry:
        """For what a quarter turn brings to this size."""
        return replace(self, width=self.height, height=self.width)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The model's input, equal to open_clip's to the bit."""
        size = self._resized(*image.size)
        if size[0] * size[1] > _MAX_RESIZED_PIXELS:
            return self.framed(image, self.framing(*image.size), scale=1)
        if size != image.size:
            image = image.resize(size, self.resample)
        if size == (self.width, self.height):
            return image
        left, top = _middle(size[0], self.width), _middle(size[1], self.height)
        if size[0] >= self.width and size[1] >= self.height:
            return image.crop((left, top, left + self.width, top + self.height))
        canvas = self._canvas()
        canvas.paste(image, (-left, -top))
        return canvas

    def framing(self, width: int, height: int, box: Box | None = None) -> Framing:
        """How `framed` makes the input of an image of this size, or of the `box` of it alone."""
        left, top, right, bottom = box or (0, 0, width, height)
        resized_w, resized_h = self._resized(max(round(right - left), 1), max(round(bottom - top), 1))
        per_x, per_y = (right - left) / resized_w, (bottom - top) / resized_h
        x, y = _middle(resized_w, self.width), _middle(resized_h, self.height)
        kept_w, kept_h = min(resized_w, self.width), min(resized_h, self.height)
        left, top = left + max(x, 0) * per_x, top + max(y, 0) * per_y
        return Framing(
            source=(width, height),
            box=(left, top, min(left + kept_w * per_x, width), min(top + kept_h * per_y, height)),
            size=(kept_w, kept_h),
            place=(max(-x, 0), max(-y, 0)),
            enough=(math.ceil(width / per_x), math.ceil(height / per_y)),
        )

    def framed(self, image: Image.Image, framing: Framing, scale: float) -> Image.Image:
        """The model's input in one resize, from an image decoded at 1/`scale` of its size.

        Differs from `__call__` by what the decoder's scaling changes, and by the rounding of the box.
        """
        return self._placed(self._part(image, framing.box, framing.size, scale), framing)

    def turned(self, image: Image.Image, framing: Framing, scale: float, degrees: float) -> Image.Image:
        """The same as `framed`, turned counter-clockwise about the middle of the box.

        What is beyond the box is seen where the corners turn in; what is beyond the image repeats its border.
        """
        left, top, right, bottom = framing.box
        (source_w, source_h), (width, height) = framing.source, framing.size
        per_x, per_y = (right - left) / width, (bottom - top) / height
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        # Pixels of the result around it that turn in; one more for the resampling.
        around_x = max(math.ceil((width * abs(cosine) + height * abs(sine) - width) / 2), 0) + 1
        around_y = max(math.ceil((width * abs(sine) + height * abs(cosine) - height) / 2), 0) + 1
        more_left, more_right = (min(int(room / per_x), around_x) for room in (left, source_w - right))
        more_top, more_bottom = (min(int(room / per_y), around_y) for room in (top, source_h - bottom))
        box = (
            left - more_left * per_x,
            top - more_top * per_y,
            right + more_right * per_x,
            bottom + more_bottom * per_y,
        )
        size = (width + more_left + more_right, height + more_top + more_bottom)
        seen = self._part(image, box, size, scale)
        padded = np.pad(
            np.asarray(seen),
            (
                (around_y - more_top, around_y - more_bottom),
                (around_x - more_left, around_x - more_right),
                (0, 0),
            ),
            mode="edge",
        )
        middle_x, middle_y = width / 2, height / 2
        back = (
            cosine,
            -sine,
            around_x + middle_x - cosine * middle_x + sine * middle_y,
            sine,
            cosine,
            around_y + middle_y - sine * middle_x - cosine * middle_y,
        )
        # The size is right already: bilinear loses little, in a quarter of the time of bicubic.
        part = Image.fromarray(padded).transform(
            framing.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
        )
        return self._placed(part, framing)

    def _resized(self, width: int, height: int) -> Size:
        """Size of the whole image before the middle is cut out of it, or the rest filled."""
        if self.mode == "squash":
            return self.width, self.height
        ratio_w, ratio_h = width / self.width, height / self.height
        if self.mode == "shortest" and self.width == self.height:
            short, long = min(width, height), max(width, height)
            longer = int(self.width * long / short)
            return (self.width, longer) if width <= height else (longer, self.width)
        ratio = max(ratio_w, ratio_h) if self.mode == "longest" else min(ratio_w, ratio_h)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)

    def _part(self, image: Image.Image, box: Box, size: Size, scale: float) -> Image.Image:
        left, top, right, bottom = (edge / scale for edge in box)
        within = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
        return image.resize(size, self.resample, box=within)

    def _placed(self, part: Image.Image, framing: Framing) -> Image.Image:
        if framing.size == (self.width, self.height):
            return part
        canvas = self._canvas()
        canvas.paste(part, framing.place)
        return canvas

    def _canvas(self) -> Image.Image:
        return Image.new("RGB", (self.width, self.height), (self.fill, self.fill, self.fill))


def _middle(size: int, wanted: int) -> int:
    """Where the middle `wanted` of `size` begins; negative: so much is filled before it."""
    return round((size - wanted) / 2) if size >= wanted else -((wanted - size) // 2)
