"""Tensors of the Open Inference Protocol: named, typed, and laid out in bytes.

Enters: bytes as the wire has them ("raw contents"), or elements one by one. Leaves: `Tensor`, checked: as
many elements as its shape says. Used by both faces and by `inference.py`.

An element of BYTES is its length in four bytes, little-endian, and then itself.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cliptune.errors import RequestTooLargeError, TensorError

BYTES: Final = "BYTES"
_DTYPES: Final = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_LENGTH: Final = struct.Struct("<I")
_MAX_SIDES: Final = 8
# Far more than a request may hold; an empty element takes four bytes on the wire and more here.
_MAX_ELEMENTS: Final = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One input or output."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: tuple[bytes, ...] = ()
    """Of BYTES."""
    array: npt.NDArray[Any] | None = None
    """Of any other type, in its shape."""

    @classmethod
    def from_raw(cls, name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
        """From raw contents. `TensorError` when they are not what type and shape say."""
        sides = _sides(name, datatype, shape)
        if datatype == BYTES:
            elements = _split(name, raw, math.prod(sides))
            return cls(name=name, datatype=datatype, shape=sides, elements=elements)
        dtype = _DTYPES[datatype]
        expected = math.prod(sides) * dtype.itemsize
        if len(raw) != expected:
            raise TensorError(
                f"input {name!r} has {len(raw):,} bytes; {datatype} of shape {list(sides)} has {expected:,}",
                path=name,
            )
        return cls(name=name, datatype=datatype, shape=sides, array=np.frombuffer(raw, dtype).reshape(sides))

    @classmethod
    def from_elements(cls, name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
        """From elements in row-major order: `bytes` of BYTES, numbers of any other type."""
        sides = _sides(name, datatype, shape)
        if len(values) != math.prod(sides):
            raise TensorError(
                f"input {name!r} has {len(values):,} elements; its shape {list(sides)} has"
                f" {math.prod(sides):,}",
                path=name,
            )
        if datatype == BYTES:
            return cls(name=name, datatype=datatype, shape=sides, elements=tuple(values))
        try:
            array = np.array(values, _DTYPES[datatype]).reshape(sides)
        except (ValueError, TypeError, OverflowError) as error:
            raise TensorError(f"input {name!r} is not {datatype}: {error}", path=name) from None
        return cls(name=name, datatype=datatype, shape=sides, array=array)

    def raw(self) -> bytes:
        """As raw contents."""
        if self.array is None:
            return b"".join(_LENGTH.pack(len(each)) + each for each in self.elements)
        return self.array.tobytes()


def _sides(name: str, datatype: str, shape: Sequence[int]) -> tuple[int, ...]:
    if datatype != BYTES and datatype not in _DTYPES:
        allowed = ", ".join((BYTES, *_DTYPES))
        raise TensorError(
            f"input {name!r} has datatype {datatype!r}; there are {allowed}", path=name, allowed=allowed
        )
    if not 1 <= len(shape) <= _MAX_SIDES or any(not 0 <= side < 2**31 for side in shape):
        raise TensorError(f"input {name!r} has shape {list(shape)[: _MAX_SIDES + 1]}", path=name)
    count = math.prod(shape)
    if datatype == BYTES and count > _MAX_ELEMENTS:
        raise RequestTooLargeError(
            f"input {name!r} holds {count:,} elements; at most {_MAX_ELEMENTS:,} are taken at a time",
            field=name,
            limit=_MAX_ELEMENTS,
        )
    return tuple(int(side) for side in shape)


def _split(name: str, raw: bytes, count: int) -> tuple[bytes, ...]:
    elements: list[bytes] = []
    place = 0
    while place < len(raw) and len(elements) <= count:
        if place + _LENGTH.size > len(raw):
            break
        (length,) = _LENGTH.unpack_from(raw, place)
        place += _LENGTH.size
        if place + length > len(raw):
            raise TensorError(
                f"input {name!r}: element {len(elements)} has {length:,} bytes; {len(raw) - place:,} follow",
                path=name,
            )
        elements.append(raw[place : place + length])
        place += length
    if len(elements) != count or place != len(raw):
        raise TensorError(
            f"input {name!r}: its bytes do not hold just the {count:,} elements of its shape", path=name
        )
    return tuple(elements)
