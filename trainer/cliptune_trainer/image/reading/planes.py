"""What an image holds before it becomes 8-bit RGB: planes of numbers, and what its file says of them.

Leaves the readers of DICOM, TIFF and FITS; enters `window`. P: planes chosen, H, W: height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from cliptune.errors import ImageDecodeError

Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """The chosen planes of an image.

    Attributes:
        values_PHW: in the file's unit, after rescaling.
        depth: for a person: "8-bit", "12-bit", "32-bit float".
        ready: the values are 8-bit already and mean brightness: no window is applied.
        together: the planes are the colours of one picture and share a window; otherwise each has its own.
        full: lowest and highest value that the format can hold; None: it knows no bounds.
        named: the window that the file names, to [0, 1]; None: it names none.
        inverted: the lowest value is white.
        missing_PHW: pixels that hold no measurement, shown black; None: none.
    """

    values_PHW: Numbers
    depth: str
    ready: bool = False
    together: bool = False
    full: tuple[float, float] | None = None
    named: Callable[[Numbers], Numbers] | None = None
    inverted: bool = False
    missing_PHW: Numbers | None = None


def chosen(count: int, channels: Sequence[int]) -> list[int]:
    """Which of `count` planes are read: those asked for, or the first three, or the first.

    Raises:
        ImageDecodeError: a plane that was asked for is not there.
    """
    if count == 1:
        return [0]
    if not channels:
        return [0, 1, 2] if count >= 3 else [0]
    if max(channels) >= count:
        raise ImageDecodeError(
            f"the image has {count} planes, from 0; data.reading.channels names plane {max(channels)}"
        )
    return list(channels)


def integer_range(dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """All that a whole number of this type can be; None for others."""
    if dtype.kind not in "iu":
        return None
    bounds = np.iinfo(dtype)
    return float(bounds.min), float(bounds.max)


def depth_of(dtype: np.dtype[Any], bits: int | None = None) -> str:
    """For a person."""
    return f"{bits or dtype.itemsize * 8}-bit" + (" float" if dtype.kind == "f" else "")
