"""TIFF files that are more than one 8-bit picture: 16-bit and floating-point values, further channels.

Enters: the file's bytes. Leaves: `Planes`, or None for an ordinary picture, which Pillow reads as ever.
Called by `Reading`. A single grey plane needs Pillow alone; the rest is read by tifffile.

H, W: height and width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import PIL.Image

from cliptune.errors import ConflictError, ImageDecodeError, ImageSizeError
from cliptune_model.pixels import PixelLimits
from cliptune_trainer.image.optional import needed
from cliptune_trainer.image.reading.planes import (
    Numbers,
    Planes,
    chosen,
    depth_of,
    integer_range,
)

_MARKS: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _SAMPLES = 258, 262, 277
_WHITE_IS_ZERO: Final = 0
_DEEP_MODES: Final = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
# Values of all planes of an image together; they are in memory at once.
_MAX_VALUES: Final = 400_000_000
# tifffile's letters for an axis of planes: samples of a pixel, channels, pages of unknown meaning. Along
# others (depth, time) the first is taken.
_PLANE_AXES: Final = "SCQI"


def is_tiff(encoded: bytes) -> bool:
    """By its first bytes; BigTIFF too."""
    return encoded[:4] in _MARKS


def tiff_planes(encoded: bytes, channels: Sequence[int], limits: PixelLimits) -> Planes | None:
    """The chosen planes.

    Raises:
        ImageDecodeError: damaged, or compressed in a way that cannot be read here.
        ImageSizeError: too many pixels.
        ConflictError: tifffile is needed and not installed.
    """
    try:
        with PIL.Image.open(io.BytesIO(encoded), formats=("TIFF",)) as image:
            limits.check(*image.size)
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            bits = max(tags.get(_BITS, (1,)))
            one = getattr(image, "n_frames", 1) == 1
            if one and bits <= 8 and tags.get(_SAMPLES, 1) in (1, 3, 4):
                return None
            if one and image.mode in _DEEP_MODES:
                inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
                return grey_planes(np.asarray(image), bits=bits, inverted=inverted)
    except (ImageSizeError, MemoryError):
        raise
    except Exception:
        pass  # what Pillow cannot open, tifffile may
    tifffile = needed("tifffile", "medical", "reading TIFF files of several planes or 16-bit colours")
    try:
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            return _planes(file.series[0], channels, limits)
    except (ConflictError, ImageDecodeError, ImageSizeError, MemoryError):
        raise
    except Exception as error:  # on damaged files it fails with whatever its line raises
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ImageDecodeError(f"the TIFF file cannot be read: {why}") from error


def grey_planes(grey_HW: Numbers, *, bits: int | None = None, inverted: bool = False) -> Planes:
    """One plane of whole numbers or floats."""
    values_HW = grey_HW.astype(grey_HW.dtype.newbyteorder("="), copy=False)
    missing_HW = ~np.isfinite(values_HW) if values_HW.dtype.kind == "f" else None
    return Planes(
        values_PHW=values_HW[None],
        depth=depth_of(values_HW.dtype, bits),
        full=integer_range(values_HW.dtype),
        inverted=inverted,
        missing_PHW=missing_HW[None] if missing_HW is not None and missing_HW.any() else None,
    )


def _planes(series: Any, channels: Sequence[int], limits: PixelLimits) -> Planes:
    axes, shape, page = str(series.axes), tuple(series.shape), series.keyframe
    limits.check(shape[axes.index("X")], shape[axes.index("Y")])
    if math.prod(shape) > _MAX_VALUES:
        raise ImageSizeError(
            f"the image holds {math.prod(shape):,} values; at most {_MAX_VALUES:,} are taken",
            limit=_MAX_VALUES,
        )
    values: Numbers = series.asarray()
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise ImageDecodeError(f"the TIFF file holds {values.dtype} values, which are no brightness")
    plane_axis = next((axis for axis in _PLANE_AXES if axis in axes and shape[axes.index(axis)] > 1), "")
    # Planes first, then rows and columns; along every other axis the first.
    for place in reversed(range(len(axes))):
        if axes[place] not in ("Y", "X", plane_axis):
            values = values.take(0, axis=place)
    kept = [axis for axis in axes if axis in ("Y", "X", plane_axis)]
    values_PHW = values.transpose([kept.index(axis) for axis in (plane_axis, "Y", "X") if axis])
    values_PHW = values_PHW.reshape(-1, *values_PHW.shape[-2:])
    values_PHW = values_PHW[chosen(len(values_PHW), channels)]
    values_PHW = values_PHW.astype(values_PHW.dtype.newbyteorder("="), copy=False)
    missing_PHW = ~np.isfinite(values_PHW) if values_PHW.dtype.kind == "f" else None
    bits = int(page.bitspersample) if values_PHW.dtype.kind != "b" else 8
    return Planes(
        values_PHW=values_PHW,
        depth=depth_of(values_PHW.dtype, bits),
        ready=values_PHW.dtype == np.uint8,
        together=plane_axis == "S" and page.photometric.name == "RGB",
        full=integer_range(values_PHW.dtype),
        inverted=page.photometric.name == "MINISWHITE",
        missing_PHW=missing_PHW if missing_PHW is not None and missing_PHW.any() else None,
    )
