"""A FITS file: the first image in it, in physical values, the way up that astronomers show it.

Enters: the file's bytes. Leaves: `Planes`. Called by `Reading`. Read by astropy.

H, W: height and width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cliptune.errors import ConflictError, ImageDecodeError, ImageSizeError
from cliptune_model.pixels import PixelLimits
from cliptune_trainer.image.optional import needed
from cliptune_trainer.image.reading.planes import Numbers, Planes, chosen

_MAX_VALUES: Final = 400_000_000


def is_fits(encoded: bytes) -> bool:
    """By its first card."""
    return encoded.startswith(b"SIMPLE  =")


def fits_planes(encoded: bytes, channels: Sequence[int], limits: PixelLimits) -> Planes:
    """The chosen planes of the first image that has rows and columns. Of a cube the third axis is that of
    planes; along further ones the first is taken.

    Raises:
        ImageDecodeError: damaged, or without an image.
        ImageSizeError: too many pixels.
        ConflictError: astropy is not installed.
    """
    fits = needed("astropy.io.fits", "fits", "reading FITS files")
    try:
        with fits.open(io.BytesIO(encoded), memmap=False) as units:
            image = next((unit for unit in units if unit.is_image and len(unit.shape) >= 2), None)
            if image is None:
                raise ImageDecodeError("the FITS file holds no image")
            return _planes(image, channels, limits)
    except (ConflictError, ImageDecodeError, ImageSizeError, MemoryError):
        raise
    except Exception as error:  # on damaged files it fails with whatever its line raises
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ImageDecodeError(f"the FITS file cannot be read: {why}") from error


def _planes(image: Any, channels: Sequence[int], limits: PixelLimits) -> Planes:
    shape, bits = tuple(image.shape), int(image.header["BITPIX"])
    scale, zero = float(image.header.get("BSCALE", 1.0)), float(image.header.get("BZERO", 0.0))
    limits.check(shape[-1], shape[-2])
    if math.prod(shape) > _MAX_VALUES:
        raise ImageSizeError(
            f"the image holds {math.prod(shape):,} values; at most {_MAX_VALUES:,} are taken",
            limit=_MAX_VALUES,
        )
    values: Numbers = image.data
    while values.ndim > 3:
        values = values[0]
    values_PHW = values.reshape(-1, *values.shape[-2:])
    values_PHW = values_PHW[chosen(len(values_PHW), channels), ::-1]  # the first row is the lowest
    values_PHW = values_PHW.astype(values_PHW.dtype.newbyteorder("="), copy=False)
    missing_PHW = ~np.isfinite(values_PHW) if values_PHW.dtype.kind == "f" else None
    return Planes(
        values_PHW=values_PHW,
        depth=f"{abs(bits)}-bit" + (" float" if bits < 0 else ""),
        ready=values_PHW.dtype == np.uint8,
        full=_full(bits, scale, zero),
        missing_PHW=missing_PHW if missing_PHW is not None and missing_PHW.any() else None,
    )


def _full(bits: int, scale: float, zero: float) -> tuple[float, float] | None:
    """All that a stored whole number can mean; 8-bit ones have no sign."""
    if bits < 0:
        return None
    stored = (0, 255) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    low, high = sorted(value * scale + zero for value in stored)
    return low, high
