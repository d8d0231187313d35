"""A DICOM file: rescaled to its unit, with the window that it names.

Enters: the file's bytes. Leaves: `Planes`. Called by `Reading`. Formulas: DICOM PS3.3 C.11.1 (modality) and
C.11.2.1.2 (windows). pydicom decodes; its compressed transfer syntaxes need what pydicom says they need.

F: frames, H, W: height and width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cliptune.errors import ConflictError, ImageDecodeError, ImageSizeError
from cliptune_model.pixels import PixelLimits
from cliptune_trainer.image.optional import needed
from cliptune_trainer.image.reading.planes import Numbers, Planes, chosen

_PIXELS: Final = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def is_dicom(encoded: bytes) -> bool:
    """By the mark after its preamble."""
    return encoded[128:132] == b"DICM"


def dicom_planes(encoded: bytes, channels: Sequence[int], limits: PixelLimits) -> Planes:
    """The first frame, or the frames that `channels` names: frames are slices or moments, not colours.

    Raises:
        ImageDecodeError: damaged, without pixels, or compressed in a way that cannot be read here.
        ImageSizeError: too many pixels.
        ConflictError: pydicom is not installed.
    """
    pydicom = needed("pydicom", "medical", "reading DICOM files")
    pixels = needed("pydicom.pixels", "medical", "reading DICOM files")
    try:
        return _planes(pydicom.dcmread(io.BytesIO(encoded)), pixels, channels, limits)
    except (ConflictError, ImageDecodeError, ImageSizeError, MemoryError):
        raise
    except Exception as error:  # pydicom fails on damaged files with whatever their line raises
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ImageDecodeError(f"the DICOM file cannot be read: {why}") from error


def _planes(ds: Any, pixels: Any, channels: Sequence[int], limits: PixelLimits) -> Planes:
    if not any(name in ds for name in _PIXELS):
        kind = getattr(ds.get("SOPClassUID"), "name", "")
        raise ImageDecodeError("the DICOM file holds no pixels" + (f": it is a {kind}" if kind else ""))
    limits.check(int(ds.Columns), int(ds.Rows))
    bits = int(ds.get("BitsStored", ds.BitsAllocated))
    photometric = str(ds.get("PhotometricInterpretation", "MONOCHROME2"))
    if int(ds.get("SamplesPerPixel", 1)) > 1:
        return _colours(pixels.pixel_array(ds, index=0), bits, channels)
    if photometric == "PALETTE COLOR":
        coloured_HW3 = pixels.apply_color_lut(pixels.pixel_array(ds, index=0), ds)
        if coloured_HW3.dtype.itemsize > 1:  # a table's colours are those to be shown: no window is theirs
            coloured_HW3 = (coloured_HW3 >> 8).astype(np.uint8)
        return _colours(coloured_HW3, 8, channels)
    count = int(ds.get("NumberOfFrames", 1) or 1)
    frames = chosen(count, channels) if channels else [0]
    stored_FHW = np.stack([pixels.pixel_array(ds, index=frame) for frame in frames])
    rescale = _group(ds, frames[0], "PixelValueTransformationSequence")
    return Planes(
        values_PHW=pixels.apply_modality_lut(stored_FHW, rescale),
        depth=f"{bits}-bit",
        full=_full(ds, rescale, bits, pixels),
        named=_window(ds, frames[0], pixels),
        inverted=photometric == "MONOCHROME1",
        missing_PHW=_padding(ds, stored_FHW),
    )


def _colours(coloured_HW3: Numbers, bits: int, channels: Sequence[int]) -> Planes:
    planes = np.moveaxis(coloured_HW3, -1, 0)[chosen(coloured_HW3.shape[-1], channels)]
    full = (0.0, float(2**bits - 1))
    return Planes(values_PHW=planes, depth=f"{bits}-bit", ready=bits <= 8, together=True, full=full)


def _group(ds: Any, frame: int, sequence: str) -> Any:
    """Where a module's attributes are: in the frame's or the shared functional group of an enhanced image,
    else at the top."""
    for groups, place in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        found = ds.get(groups)
        if found and place < len(found) and (inner := found[place].get(sequence)):
            return inner[0]
    return ds


def _full(ds: Any, rescale: Any, bits: int, pixels: Any) -> tuple[float, float] | None:
    """The extremes of what the stored bits can hold, in the file's unit."""
    if "PixelData" not in ds:
        return None
    signed = int(ds.get("PixelRepresentation", 0)) == 1
    stored = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
    if "ModalityLUTSequence" in rescale:
        held = int(rescale.ModalityLUTSequence[0].LUTDescriptor[2])
        return 0.0, float(2**held - 1)
    low, high = sorted(float(value) for value in pixels.apply_modality_lut(stored, rescale))
    return low, high


def _window(ds: Any, frame: int, pixels: Any) -> Any:
    """The first window that the file names; it gives [0, 1]."""
    voi = _group(ds, frame, "FrameVOILUTSequence")
    if "VOILUTSequence" in voi and len(voi.VOILUTSequence):
        top = float(2 ** int(voi.VOILUTSequence[0].LUTDescriptor[2]) - 1)
        return lambda values: pixels.apply_voi(values.astype(np.int64), voi).astype(np.float64) / top
    centre, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    if centre is None or width is None or width <= 0:
        return None
    function = str(voi.get("VOILUTFunction", "LINEAR") or "LINEAR").upper()
    return lambda values: _windowed(values, centre, width, function)


def _windowed(values: Numbers, centre: float, width: float, function: str) -> Numbers:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, with [0, 1] for [y_min, y_max]."""
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    if width <= 1.0:  # LINEAR asks for a width of at least 1; there it is a threshold
        return np.asarray(values > centre - 0.5, values.dtype)
    return np.clip((values - (centre - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _padding(ds: Any, stored_FHW: Numbers) -> Numbers | None:
    """Pixels outside what the scanner saw (PS3.3 C.7.5.1.1.2): they would widen any range."""
    if "PixelPaddingValue" not in ds:
        return None
    first = int(ds.PixelPaddingValue)
    last = int(ds.get("PixelPaddingRangeLimit", first))
    padding_FHW = (stored_FHW >= min(first, last)) & (stored_FHW <= max(first, last))
    return padding_FHW if padding_FHW.any() and not padding_FHW.all() else None


def _first(value: Any) -> float | None:
    """Of a value that may be absent, empty, one or several."""
    if value is None or value == "":
        return None
    if isinstance(value, str | int | float):
        return float(value)
    values = list(value)
    return float(values[0]) if values else None
