"""Which values of an image become black and which white.

Enters: `Planes` and the name of a window. Leaves: uint8 planes. Called by `Reading`.

P: planes, H, W: height and width.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from cliptune.errors import ImageDecodeError
from cliptune_trainer.image.reading.planes import Numbers, Planes

NAMED: Final = ("file", "range", "percentile", "full")
PERCENTILES: Final = (1.0, 99.0)
_NUMBER: Final = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CENTRE_WIDTH: Final = re.compile(rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*")


def centre_and_width(window: str) -> tuple[float, float] | None:
    """Of "CENTER,WIDTH"; None when it is none, or the width is not above 0."""
    match = _CENTRE_WIDTH.fullmatch(window)
    if match is None:
        return None
    centre, width = float(match[1]), float(match[2])
    return (centre, width) if np.isfinite([centre, width]).all() and width > 0 else None


def eight_bits(planes: Planes, window: str) -> Numbers:
    """The planes as uint8 [P, H, W].

    Raises:
        ImageDecodeError: "full" is asked of values without bounds, or every pixel is missing.
    """
    values_PHW = planes.values_PHW
    if planes.ready:
        grey_PHW = values_PHW.astype(np.uint8, copy=False)
        return 255 - grey_PHW if planes.inverted else grey_PHW
    if window == "full" and values_PHW.dtype == np.uint16 and planes.full == (0.0, 65_535.0):
        grey_PHW = (values_PHW >> 8).astype(np.uint8)  # the high byte, as the server reads such images
        grey_PHW = 255 - grey_PHW if planes.inverted else grey_PHW
    else:
        exact = np.float32 if values_PHW.dtype.itemsize <= 2 or values_PHW.dtype == np.float32 else np.float64
        unit_PHW = _unit(planes, values_PHW.astype(exact, copy=False), window)
        if planes.inverted:
            unit_PHW = 1.0 - unit_PHW
        grey_PHW = np.nan_to_num(unit_PHW * 255.0 + 0.5, copy=False).astype(np.uint8)
    if planes.missing_PHW is not None:
        grey_PHW[planes.missing_PHW] = 0
    return grey_PHW


def _unit(planes: Planes, values_PHW: Numbers, window: str) -> Numbers:
    """Values in [0, 1]; of missing pixels anything."""
    if window == "file" and planes.named is not None:
        return planes.named(values_PHW)
    asked = centre_and_width(window)
    if asked is not None:
        centre, width = asked
        return _between(values_PHW, centre - width / 2, centre + width / 2)
    if window == "full":
        return _between(values_PHW, *(planes.full or _full_of_floats(values_PHW)))
    if planes.together:
        return _between(values_PHW, *_found(values_PHW, planes.missing_PHW, window))
    parts = [
        _between(values_HW, *_found(values_HW, missing_HW, window))
        for values_HW, missing_HW in zip(
            values_PHW,
            planes.missing_PHW if planes.missing_PHW is not None else [None] * len(values_PHW),
            strict=True,
        )
    ]
    return np.stack(parts)


def _found(values: Numbers, missing: Numbers | None, window: str) -> tuple[float, float]:
    """Lowest and highest value of an image, or its percentiles, missing pixels aside."""
    present = values if missing is None else values[~missing]
    if present.size == 0:
        raise ImageDecodeError("no pixel of the image holds a value")
    if window == "percentile":
        low, high = np.percentile(present, PERCENTILES)
    else:  # "range", and "file" where the file names no window
        low, high = present.min(), present.max()
    if not np.isfinite([low, high]).all():
        raise ImageDecodeError("the image's pixels hold NaN or infinity")
    return float(low), float(high)


def _between(values: Numbers, low: float, high: float) -> Numbers:
    """`low` and below → 0, `high` and above → 1. Of an image of one value nothing stands out: 0."""
    if high <= low:
        return np.zeros_like(values)
    unit: Numbers = np.clip((values - values.dtype.type(low)) / values.dtype.type(high - low), 0.0, 1.0)
    return unit


def _full_of_floats(values: Numbers) -> tuple[float, float]:
    if np.nanmin(values) < 0.0 or np.nanmax(values) > 1.0:
        raise ImageDecodeError(
            "floating-point pixels beyond [0, 1] have no full range: set data.reading.window to 'range',"
            " 'percentile' or 'CENTER,WIDTH'"
        )
    return 0.0, 1.0
