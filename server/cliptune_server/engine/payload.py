"""Images as the engine reads them: their bytes in the request, or beside it in memory that the daemon shares.

Enters: `Image` messages, and the metadata of a call. Leaves: `Picture`s. Made by the servicer and
`inference.py`; read by the decoder and the cache. The other end is `inference/payloads.py` of the daemon.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cliptune.errors import ImageDecodeError, InternalError
from cliptune.tensors import view
from cliptune.tracing import Pair
from cliptune.v1 import tensor_pb2

# As in `inference/payloads.py`, which the engine does not import.
METADATA_KEY: Final = "cliptune-payload"
UNREADABLE: Final = "payload"

Data = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Picture:
    """One image as it was sent. `data`: of the file, or of the pixels."""

    data: Data
    pixels: tensor_pb2.Tensor | None = None
    """Their type and shape. None: it is a file."""
    given: bool = True
    """False: the message held neither."""

    @property
    def is_file(self) -> bool:
        """Otherwise it has pixels, or nothing."""
        return self.given and self.pixels is None

    def array(self) -> npt.NDArray[Any]:
        """The pixels. `TensorError`; `ImageDecodeError` when there are none."""
        if not self.given or self.pixels is None:
            raise ImageDecodeError("the image has neither bytes of a file nor pixels")
        return view(self.data, self.pixels.dtype, self.pixels.shape)


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of a request's images, in their order. Mapped as long as one of them is looked at."""

    parts: Sequence[memoryview]
    size_bytes: int

    @classmethod
    def told(cls, metadata: Iterable[Pair] | None) -> Payload | None:
        """That of a call, if it has one. `InternalError` when it cannot be read."""
        for key, value in metadata or ():
            if key == METADATA_KEY:
                return cls.read(os.fsdecode(value))
        return None

    @classmethod
    def read(cls, path: str) -> Payload:
        """Maps the file. `InternalError` when it cannot be opened or is not whole."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                whole = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
            finally:
                os.close(descriptor)
            (count,) = struct.unpack_from("<Q", whole)
            lengths = struct.unpack_from(f"<{count}Q", whole, 8)
        except (OSError, ValueError, struct.error) as error:
            raise InternalError(
                f"the images beside the request cannot be read: {error}",
                **{UNREADABLE: path},
            ) from None
        ends = np.cumsum([8 + 8 * count, *lengths]).tolist()
        if ends[-1] != len(whole):
            raise InternalError("the images beside the request are not whole", **{UNREADABLE: path})
        return cls([whole[start:end] for start, end in pairwise(ends)], len(whole))


def pictures(images: Sequence[tensor_pb2.Image], payload: Payload | None = None) -> list[Picture]:
    """Those of a request."""
    if payload is not None and len(payload.parts) != len(images):
        raise InternalError(f"{len(payload.parts)} images lie beside a request of {len(images)}")
    return [
        _picture(image, payload.parts[place] if payload is not None else None)
        for place, image in enumerate(images)
    ]


def _picture(image: tensor_pb2.Image, data: memoryview | None) -> Picture:
    match image.WhichOneof("source"):
        case "encoded":
            return Picture(image.encoded if data is None else data)
        case "pixels":
            pixels = tensor_pb2.Tensor(dtype=image.pixels.dtype, shape=image.pixels.shape)
            return Picture(image.pixels.data if data is None else data, pixels)
    return Picture(b"", given=False)
