"""The sampler's `main`: limits itself, reads one order from stdin, writes what it found to stdout, and ends.

    echo '{"folder": "...", "entry": "captions.csv", "samples": 8}' | python -P -m cliptune_server.sampler

Out: frames, each 4 bytes of length and a `GetDatasetResponse`. The first holds columns, number of rows and
the sample rows; each later one a `SampleRow` with a picture, as it is decoded: should one end the process,
those before it have arrived. Started by `datasets/preview.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import struct
import sys
from pathlib import Path
from typing import Final

from cliptune.errors import CliptuneError
from cliptune.v1 import data_pb2, tensor_pb2
from cliptune_model.pixels import decode_scaled
from cliptune_server.sampler.rows import look

PICTURE_PIXELS: Final = 192
_JPEG_QUALITY: Final = 85
# An image of the largest size that is taken (100 megapixels) needs less than 1 GiB beside Python itself.
_MEMORY_BYTES: Final = 3 * 1024**3
_CPU_S: Final = 60


def main() -> int:
    """Answers one order. Exit status 0, or 1 with a line on stderr when nothing can be read."""
    _limit()
    order = json.loads(sys.stdin.buffer.read())
    try:
        found = look(Path(order["folder"]), order["entry"], order["samples"])
    except Exception as error:  # the parser of a format may fail on hostile bytes with anything
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    samples = [data_pb2.SampleRow(row=row.number, fields=row.fields) for row in found.samples]
    _send(data_pb2.GetDatasetResponse(columns=found.columns, rows=found.rows, samples=samples))
    for row in found.samples:
        with contextlib.suppress(CliptuneError, OSError, MemoryError):
            if row.picture is not None:
                image = tensor_pb2.Image(encoded=small_jpeg(row.picture()))
                sample = data_pb2.SampleRow(row=row.number, image=image)
                _send(data_pb2.GetDatasetResponse(samples=[sample]))
    return 0


def small_jpeg(encoded: bytes) -> bytes:
    """An image file → a JPEG of at most 192 pixels a side. Errors as of `decode_scaled`."""

    def enough(width: int, height: int) -> tuple[int, int]:
        scale = max(width, height) / PICTURE_PIXELS
        return max(1, round(width / scale)), max(1, round(height / scale))

    image, _ = decode_scaled(encoded, enough)
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _limit() -> None:
    """A bomb ends this process and nothing else; nothing can be written to any file."""
    limits = {
        resource.RLIMIT_CPU: _CPU_S,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: _MEMORY_BYTES,
    }
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of addresses
            resource.setrlimit(limit, (value, value))


def _send(message: data_pb2.GetDatasetResponse) -> None:
    content = message.SerializeToString()
    sys.stdout.buffer.write(struct.pack(">I", len(content)) + content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
