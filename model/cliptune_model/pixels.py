"""From the bytes of an image file, or from raw pixels, to an RGB image; hostile input included.

Enters: what a user sent or a data set holds. Leaves: a fully loaded RGB `PIL.Image`, ready for
`Clip.preprocess`. Called by the engine's decode threads and by the trainer's loader. Size is judged from the
header, before a pixel is decoded. EXIF orientation is not applied: open_clip does not apply it either.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import PIL.Image

from cliptune.errors import ImageDecodeError, ImageSizeError, InvalidInputError, OverloadedError, TensorError
from cliptune_model.quiet import Quiet

# Nothing else is tried: some of Pillow's other formats start programs or read other files.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Pillow warns about odd metadata and large sizes, which are judged here.
_quiet_pillow: Final = Quiet(r"PIL\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelLimits:
    """The largest image that is decoded."""

    max_pixels: int = 100_000_000
    max_side: int = 32_768

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or self.max_side < 1:
            raise InvalidInputError(f"pixel limits must be positive: {self.max_pixels=}, {self.max_side=}")

    def check(self, width: int, height: int) -> None:
        """Raises ImageSizeError when an image of this size is not taken."""
        size = f"the image is {width:,} × {height:,} pixels"
        if width < 1 or height < 1:
            raise ImageSizeError(f"{size}: it has no pixels", width=width, height=height, limit=1)
        if max(width, height) > self.max_side:
            raise ImageSizeError(
                f"{size}; a side is at most {self.max_side:,}",
                width=width,
                height=height,
                limit=self.max_side,
            )
        if width * height > self.max_pixels:
            raise ImageSizeError(
                f"{size}; at most {self.max_pixels:,} are taken",
                width=width,
                height=height,
                limit=self.max_pixels,
            )


DEFAULT_LIMITS: Final = PixelLimits()


def decode_image(encoded: bytes, limits: PixelLimits = DEFAULT_LIMITS) -> PIL.Image.Image:
    """Bytes of a JPEG, PNG, WebP, BMP, GIF or TIFF file → RGB image (the first frame of several).

    Palettes are looked up, alpha is dropped and CMYK is converted, as Pillow's `convert("RGB")` does. Deeper
    pixels are brought to 8 bits by their range rather than clipped (see `_to_eight_bits`).

    Raises:
        ImageDecodeError: corrupt, truncated, or not such a file.
        ImageSizeError: no pixels, too many, or a side too long.
        OverloadedError: not enough memory.
    """
    return _decode(encoded, limits, lambda image: 1.0)[0]


def decode_scaled(
    encoded: bytes, enough: Callable[[int, int], tuple[int, int]], limits: PixelLimits = DEFAULT_LIMITS
) -> tuple[PIL.Image.Image, float]:
    """As `decode_image`, but a JPEG may be decoded at a half, a quarter or an eighth of its size.

    The decoder then computes fewer coefficients of each block (libjpeg's DCT scaling), which is quicker and
    differs a little from scaling the whole image afterwards.

    Args:
        encoded: the file.
        enough: told (width, height) of the image; says which (width, height) is still large enough.
        limits: of the whole image.

    Returns:
        The image, and what its size was divided by: 1, 2, 4 or 8. A side that does not divide is rounded up.

    Raises:
        As `decode_image`; and whatever `enough` raises as an ImageDecodeError.
    """

    def draft(image: PIL.Image.Image) -> float:
        width, height = image.size
        drafted = image.draft(None, enough(width, height))
        return 1.0 if drafted is None else width / drafted[1][2]

    return _decode(encoded, limits, draft)


def _decode(
    encoded: bytes, limits: PixelLimits, before_load: Callable[[PIL.Image.Image], float]
) -> tuple[PIL.Image.Image, float]:
    if not encoded:
        raise ImageDecodeError("the image has no bytes")
    with _quiet_pillow:
        try:
            with PIL.Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                limits.check(image.width, image.height)
                scale = before_load(image)
                image.load()
                return _to_rgb(image), scale
        except (ImageDecodeError, ImageSizeError):
            raise
        except PIL.Image.DecompressionBombError as error:
            limits.check(*_declared_size(encoded))
            raise ImageSizeError(str(error), limit=limits.max_pixels) from error
        except PIL.UnidentifiedImageError as error:
            if 0 in (declared := _declared_size(encoded)):  # Pillow recognises no image without pixels
                limits.check(*declared)
            raise ImageDecodeError(f"not an image file ({', '.join(FORMATS)} are read)") from error
        except MemoryError as error:
            raise OverloadedError("not enough memory to decode the image") from error
        except Exception as error:  # Pillow's decoders fail on hostile bytes with whatever their line raises
            raise ImageDecodeError(f"the image is corrupt or truncated: {error}") from error


def image_from_pixels(pixels: np.ndarray[Any, Any], limits: PixelLimits = DEFAULT_LIMITS) -> PIL.Image.Image:
    """[H, W, 3] RGB, uint8 in 0-255 or float32 in [0, 1] → RGB image; floats are rounded to 8 bits.

    Raises:
        TensorError: another dtype or shape, NaN, infinity, or floats outside [0, 1].
        ImageSizeError: no pixels, too many, or a side too long.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise TensorError(f"pixels have shape [H, W, 3], not {list(pixels.shape)}")
    limits.check(pixels.shape[1], pixels.shape[0])
    if pixels.dtype == np.uint8:
        return PIL.Image.fromarray(np.ascontiguousarray(pixels))
    if pixels.dtype != np.float32:
        raise TensorError(f"pixels are uint8 or float32, not {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise TensorError("pixels hold NaN or infinity")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0.0 or high > 1.0:
        raise TensorError(f"float32 pixels lie in [0, 1]; these lie in [{low:g}, {high:g}]")
    return PIL.Image.fromarray((pixels * np.float32(255.0) + np.float32(0.5)).astype(np.uint8))


def _declared_size(encoded: bytes) -> tuple[int, int]:
    """(width, height) in the header of a PNG or BMP, for images that Pillow will not open; else (1, 1)."""
    if encoded.startswith(b"\x89PNG\r\n\x1a\n") and len(encoded) >= 24:
        width, height = struct.unpack_from(">II", encoded, 16)
        return width, height
    if encoded.startswith(b"BM") and len(encoded) >= 26:
        width, height = struct.unpack_from("<ii", encoded, 18)
        return abs(width), abs(height)
    return 1, 1


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    # A transparent colour says nothing in RGB, and Pillow would warn about it.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _to_eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Grey values deeper than 8 bits → "L". Pillow's own conversion clips them at 255.

    16-bit integers keep their high byte, as Pillow itself does for 16-bit colour. 32-bit integers are read as
    8-bit when none is above 255, else as 16-bit. Floats are taken as [0, 1] or as [0, 255].
    """
    grey_HW = np.asarray(image)
    if image.mode.startswith("I;16"):
        return PIL.Image.fromarray((grey_HW >> 8).astype(np.uint8))
    if not np.isfinite(grey_HW).all():
        raise ImageDecodeError("the image's pixels hold NaN or infinity")
    low, high = grey_HW.min(), grey_HW.max()
    top = 65_535 if image.mode == "I" else 255
    if low < 0 or high > top:
        raise ImageDecodeError(
            f"the image's {image.mode!r} pixels lie in [{low}, {high}], beyond [0, {top}]: "
            "save it with 8 or 16 bits"
        )
    if image.mode == "I":
        return PIL.Image.fromarray((grey_HW >> 8 if high > 255 else grey_HW).astype(np.uint8))
    scale = np.float32(255.0 if high <= 1.0 else 1.0)
    return PIL.Image.fromarray((grey_HW * scale + np.float32(0.5)).astype(np.uint8))
