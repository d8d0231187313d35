"""From the bytes of any image that a data set may hold to 8-bit RGB.

Enters: bytes. Leaves: an RGB image, and how deep its values were. Called by the decoder and by preparation.
Ordinary pictures are read as the server reads them; DICOM, FITS, 16-bit and multi-channel images through the
window and the channels that the spec names. Their readers are imported when the first such image is met.
Needs no torch, so that a decoding process starts quickly.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import PIL.Image

from cliptune.errors import ImageDecodeError, OverloadedError, SpecError
from cliptune_model.pixels import DEFAULT_LIMITS, PixelLimits, decode_image, decode_scaled
from cliptune_model.quiet import Quiet
from cliptune_trainer.image.reading.dicom import dicom_planes, is_dicom
from cliptune_trainer.image.reading.fits import fits_planes, is_fits
from cliptune_trainer.image.reading.planes import Planes
from cliptune_trainer.image.reading.tiff import grey_planes, is_tiff, tiff_planes
from cliptune_trainer.image.reading.window import NAMED, centre_and_width, eight_bits

WINDOWS: Final = f"{', '.join(NAMED)}, or CENTER,WIDTH with a width above 0"
_MAX_CHANNEL: Final = 65_535
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_GREY: Final = 0
# They warn about odd metadata, which is judged here.
_quiet_readers: Final = Quiet(r"(PIL|pydicom|tifffile|astropy)(\.|$)")


@dataclass(frozen=True, slots=True)
class Opened:
    """An RGB image. `depth` is of its file: "8-bit", "16-bit", "32-bit float"."""

    image: PIL.Image.Image
    depth: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How images that are more than 8-bit RGB become RGB: the spec's `[data.reading]`.

    Attributes:
        window: "file", "range", "percentile", "full" or "CENTER,WIDTH".
        channels: the planes that become red, green and blue; one: a grey image; none: the first three, or the
            first.
    """

    window: str = "file"
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.window not in NAMED and centre_and_width(self.window) is None:
            raise SpecError(
                f"data.reading.window is {self.window!r}; allowed: {WINDOWS}",
                path="data.reading.window",
                allowed=WINDOWS,
            )
        in_range = all(0 <= channel <= _MAX_CHANNEL for channel in self.channels)
        if len(self.channels) not in (0, 1, 3) or not in_range:
            allowed = "none, one or three planes, counted from 0"
            raise SpecError(
                f"data.reading.channels is {list(self.channels)}; allowed: {allowed}",
                path="data.reading.channels",
                allowed=allowed,
            )

    def __call__(self, encoded: bytes, limits: PixelLimits = DEFAULT_LIMITS) -> Opened:
        """The whole image.

        Raises:
            ImageDecodeError, ImageSizeError: it cannot be read, or is too large.
            OverloadedError: not enough memory.
            ConflictError: the package that reads such files is not installed; the message names it.
        """
        deep = self._deep(encoded, limits)
        return deep or Opened(self._picked(decode_image(encoded, limits)), _picture_depth(encoded))

    def scaled(
        self, encoded: bytes, enough: Callable[[int, int], tuple[int, int]]
    ) -> tuple[PIL.Image.Image, float]:
        """As `cliptune_model.pixels.decode_scaled`; raises as a call does."""
        deep = self._deep(encoded, DEFAULT_LIMITS)
        if deep is None:
            image, scale = decode_scaled(encoded, enough)
            return self._picked(image), scale
        enough(*deep.image.size)
        return deep.image, 1.0

    def _deep(self, encoded: bytes, limits: PixelLimits) -> Opened | None:
        """An image that is windowed or has planes to choose from; None: an ordinary picture."""
        try:
            with _quiet_readers:
                planes = self._planes(encoded, limits)
                if planes is None:
                    return None
                return Opened(_rgb(eight_bits(planes, self.window)), planes.depth)
        except MemoryError as error:
            raise OverloadedError("not enough memory to decode the image") from error

    def _planes(self, encoded: bytes, limits: PixelLimits) -> Planes | None:
        if is_dicom(encoded):
            return dicom_planes(encoded, self.channels, limits)
        if is_fits(encoded):
            return fits_planes(encoded, self.channels, limits)
        if is_tiff(encoded):
            return tiff_planes(encoded, self.channels, limits)
        if _png_depth(encoded) == 16:
            return self._png_planes(encoded, limits)
        return None

    def _png_planes(self, encoded: bytes, limits: PixelLimits) -> Planes | None:
        if encoded[25] != _PNG_GREY:
            if self.window not in ("file", "full"):
                raise ImageDecodeError(
                    "of a 16-bit PNG in colour only the high bytes can be read (data.reading.window 'full'):"
                    " save it as TIFF"
                )
            return None
        try:
            with PIL.Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
                limits.check(*image.size)
                return grey_planes(np.asarray(image), bits=16)
        except (OSError, SyntaxError, ValueError, EOFError):
            return None  # damaged: told as of any other PNG

    def _picked(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The channels of an ordinary picture."""
        if self.channels in ((), (0, 1, 2)):
            return image
        if max(self.channels) > 2:
            raise ImageDecodeError(
                f"the picture has red, green and blue; data.reading.channels names plane {max(self.channels)}"
            )
        bands = image.split()
        picked = [bands[channel] for channel in self.channels]
        return PIL.Image.merge("RGB", picked * (3 // len(picked)))


def _rgb(grey_PHW: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> PIL.Image.Image:
    bands = [PIL.Image.fromarray(np.ascontiguousarray(grey_HW)) for grey_HW in grey_PHW]
    return PIL.Image.merge("RGB", bands * (3 // len(bands)))


def _png_depth(encoded: bytes) -> int:
    """Bits of a value, from the header of a PNG file; else 0."""
    return encoded[24] if encoded.startswith(_PNG) and len(encoded) > 25 else 0


def _picture_depth(encoded: bytes) -> str:
    return "16-bit" if _png_depth(encoded) == 16 else "8-bit"
