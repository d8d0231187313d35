"""Small real images, drawn: a coloured shape on a noisy ground, and files that are broken on purpose.

Drawn by Pillow from a seed, so the same call gives the same bytes; a model can learn to tell them apart in a
few steps. Called by tests and by `datasets.py`.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

COLOURS: Final = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
}
SHAPES: Final = ("circle", "square", "triangle")


def draw(colour: str = "red", shape: str = "circle", *, size: int = 64, seed: int = 0) -> Image.Image:
    """RGB image [size, size] of one shape; `seed` moves it, scales it and changes the noise."""
    random = np.random.default_rng([seed, size, *colour.encode(), *shape.encode()])
    image = Image.fromarray(random.integers(90, 120, (size, size, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    radius = size * random.uniform(0.25, 0.38)
    x, y = size / 2 + random.uniform(-0.1, 0.1, 2) * size
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    elif shape == "triangle":
        pen.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=COLOURS[colour])
    else:
        raise ValueError(f"no such shape: {shape!r}; there are {SHAPES}")
    return image


def caption(colour: str, shape: str) -> str:
    """What the image shows: "a red circle"."""
    return f"a {colour} {shape}"


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """Bytes of an image file; `form` is Pillow's name: "PNG", "JPEG", "WEBP"."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def png(colour: str = "red", shape: str = "circle", *, size: int = 64, seed: int = 0) -> bytes:
    """A PNG file of `draw(...)`."""
    return encoded(draw(colour, shape, size=size, seed=seed), "PNG")


def jpeg(colour: str = "red", shape: str = "circle", *, size: int = 64, seed: int = 0) -> bytes:
    """A JPEG file of `draw(...)`."""
    return encoded(draw(colour, shape, size=size, seed=seed), "JPEG")


def truncated_jpeg() -> bytes:
    """The first half of a JPEG file: its header is whole, its pixels are not."""
    whole = jpeg(size=128)
    return whole[: len(whole) // 2]


def not_an_image() -> bytes:
    """Bytes of no image format."""
    return b"this is no image, however long one looks at it" * 8


def header_only_png(width: int, height: int) -> bytes:
    """A tiny PNG file that claims width × height grey pixels and holds one row of them: a decompression bomb
    when they are many, impossible when one of them is 0."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    row = zlib.compress(b"\0" * (min(width, 1_000_000) + 1))
    chunks = ((b"IHDR", header), (b"IDAT", row), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def wide_png(width: int = 50_000) -> bytes:
    """A whole, decodable PNG file of width × 1 pixels."""
    return encoded(Image.new("RGB", (width, 1), (10, 200, 30)), "PNG")
