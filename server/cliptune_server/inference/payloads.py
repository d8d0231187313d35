"""Large images on their way to the engine: beside the message, in memory that both processes map.

Enters: a request with images. Leaves: the same request without their bytes, and the place where these lie.
Used by `engine_process.py`; the other end is `engine/payload.py`. Passing a megabyte through the socket
costs 4 ms of CPU in copies (two cores, x86-64), this way 1 ms; below a quarter of a megabyte neither is the
better one.

On Linux the memory is an anonymous file that the engine opens through /proc: it is gone with the last process
that holds it, however that ends. Elsewhere it is a file in the private folder of the engine's socket, which
the next daemon sweeps away if this one was killed. What finds no room goes through the socket as ever.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from cliptune.tracing import Pair
from cliptune.v1 import inference_pb2, tensor_pb2

METADATA_KEY: Final = "cliptune-payload"
"""Path of the file: the number of images, the length of each (64 bits, little-endian), then their bytes."""
UNREADABLE: Final = "payload"
"""In the metadata of the engine's error: it could not open it."""
WORTH_BYTES: Final = 256 * 1024
TOTAL_BYTES: Final = 512 * 1024 * 1024
"""Of all requests that are under way."""

_log = logging.getLogger(__name__)

_Request = TypeVar("_Request")


class Payloads:
    """One engine's."""

    def __init__(
        self, folder: Path, *, total_bytes: int = TOTAL_BYTES, anonymous: bool | None = None
    ) -> None:
        """`folder`: for files where memory has no names. `anonymous`: whether it has; None: as the system."""
        self._folder: Final = folder
        self._anonymous: Final = hasattr(os, "memfd_create") if anonymous is None else anonymous
        self._total_bytes: Final = total_bytes
        self._numbers: Final = itertools.count(1)
        self._on = True
        self.held_bytes = 0
        self.passed = 0
        """Requests that went this way."""

    def turn_off(self, why: str) -> None:
        """From now on everything goes through the socket."""
        if self._on:
            _log.warning("images are not passed to the engine through memory: %s", why)
        self._on = False

    @asynccontextmanager
    async def beside(self, request: _Request) -> AsyncIterator[tuple[_Request, tuple[Pair, ...]]]:
        """What to send instead of `request`, and with which metadata; the request itself stays as it is."""
        size = request.ByteSize() if isinstance(request, _WITH_IMAGES) else 0
        if not self._on or size < WORTH_BYTES or self.held_bytes + size > self._total_bytes:
            yield request, ()
            return
        self.held_bytes += size
        try:
            writing = asyncio.get_running_loop().run_in_executor(None, self._write, request)
            try:
                written = await asyncio.shield(writing)
            except asyncio.CancelledError:
                writing.add_done_callback(_close_unused)
                raise
            if written is None:
                yield request, ()
                return
            message, place = written
            try:
                self.passed += 1
                yield message, ((METADATA_KEY, place.path),)
            finally:
                place.close()
        finally:
            self.held_bytes -= size

    def _write(self, request: Any) -> tuple[Any, _Place] | None:
        """On a thread. None: there is no room."""
        message, parts = _apart(request)
        place: _Place | None = None
        try:
            place = self._place()
            place.write([struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)), *parts])
        except OSError as error:
            if place is not None:
                place.close()
            self.turn_off(str(error))
            return None
        return message, place

    def _place(self) -> _Place:
        if self._anonymous:
            descriptor = os.memfd_create("cliptune-payload", os.MFD_CLOEXEC)
            return _Place(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", named=False)
        path = self._folder / f"payload-{os.getpid()}-{next(self._numbers)}"
        if not str(path).isascii():  # as metadata has to be
            raise OSError(f"the path {str(path)!r} cannot be told to the engine")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return _Place(os.open(path, flags, 0o600), str(path), named=True)


class _Place:
    """An open file. `close` it once."""

    def __init__(self, descriptor: int, path: str, *, named: bool) -> None:
        self.path: Final = path
        self._descriptor: Final = descriptor
        self._named: Final = named

    def write(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(self._descriptor, left) :]

    def close(self) -> None:
        os.close(self._descriptor)
        if self._named:
            Path(self.path).unlink(missing_ok=True)


def _close_unused(writing: asyncio.Future[tuple[Any, _Place] | None]) -> None:
    """Of a caller who left while it was written."""
    if not writing.cancelled() and writing.exception() is None and (written := writing.result()) is not None:
        written[1].close()


_WITH_IMAGES: Final = (
    inference_pb2.EmbedImagesRequest,
    inference_pb2.SimilarityRequest,
    inference_pb2.ClassifyRequest,
    inference_pb2.ScorePairsRequest,
)


def _apart(request: Any) -> tuple[Any, list[bytes]]:
    """The request without its images' bytes, and these in their order. Nothing is copied that is not sent."""
    message, parts = type(request)(), list[bytes]()
    for field, value in request.ListFields():
        if field.name == "images":
            message.images.extend(_stripped(value, parts))
        elif field.name == "pairs":
            stripped = _stripped([pair.image for pair in value], parts)
            message.pairs.extend(
                inference_pb2.ImageTextPair(image=image, text=pair.text)
                for pair, image in zip(value, stripped, strict=True)
            )
        elif isinstance(value, str | int):
            setattr(message, field.name, value)
        else:
            getattr(message, field.name).extend(value)
    return message, parts


def _stripped(images: Sequence[tensor_pb2.Image], parts: list[bytes]) -> list[tensor_pb2.Image]:
    found = []
    for image in images:
        source = image.WhichOneof("source")
        if source == "pixels":
            pixels = tensor_pb2.Tensor(dtype=image.pixels.dtype, shape=image.pixels.shape)
            parts.append(image.pixels.data)
            found.append(tensor_pb2.Image(pixels=pixels))
        elif source == "encoded":
            parts.append(image.encoded)
            found.append(tensor_pb2.Image(encoded=b""))
        else:
            parts.append(b"")
            found.append(tensor_pb2.Image())
    return found
