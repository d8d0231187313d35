"""Pictures drawn on the spot: images of no domain, which need no data.

Enters: nothing. Leaves: RGB pictures, the same ones every time. Called by `agreement`.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

_SIDE: Final = 224
_COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
_GROUNDS: Final = ("white", "black", "lightgray", "skyblue", "beige")
_SEED: Final = 0


def drawings() -> tuple[Image.Image, ...]:
    """Some ninety: figures alone and several of a kind, patterns, scenes of some strokes, faces, textures."""
    random = np.random.default_rng(_SEED)
    pictures = [
        _figures(random, sides, count) for sides in (0, 3, 4, 5, 6, -5) for count in (1, 1, 1, 2, 5, 12)
    ]
    pictures += [_stripes(random, kind) for kind in ("across", "along", "check", "rings", "dots") * 3]
    pictures += [_scene(random) for _ in range(12)]
    pictures += [_face(random, turn) for turn in range(8)]
    pictures += [_texture(random, grain) for grain in (2, 4, 8, 16, 32, 64) * 3]
    return tuple(pictures)


def _blank(random: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (_SIDE, _SIDE), str(random.choice(_GROUNDS)))
    return picture, ImageDraw.Draw(picture)


def _figures(random: np.random.Generator, sides: int, count: int) -> Image.Image:
    """`sides`: 0: circles; negative: stars."""
    picture, draw = _blank(random)
    colour = str(random.choice(_COLOURS))
    for _ in range(count):
        radius = float(random.uniform(0.28, 0.42)) * _SIDE / math.sqrt(count)
        x, y = random.uniform(radius, _SIDE - radius, 2)
        if sides == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="black")
            continue
        corners = abs(sides) * (2 if sides < 0 else 1)
        turn = float(random.uniform(0, 2 * math.pi))
        points = [
            (
                x
                + radius
                * (0.4 if sides < 0 and corner % 2 else 1.0)
                * math.cos(turn + 2 * math.pi * corner / corners),
                y
                + radius
                * (0.4 if sides < 0 and corner % 2 else 1.0)
                * math.sin(turn + 2 * math.pi * corner / corners),
            )
            for corner in range(corners)
        ]
        draw.polygon(points, fill=colour, outline="black")
    return picture


def _stripes(random: np.random.Generator, kind: str) -> Image.Image:
    picture, draw = _blank(random)
    colour, width = str(random.choice(_COLOURS)), int(random.integers(8, 28))
    for start in range(0, _SIDE, 2 * width):
        if kind == "across":
            draw.rectangle((0, start, _SIDE, start + width), fill=colour)
        elif kind == "along":
            draw.rectangle((start, 0, start + width, _SIDE), fill=colour)
        elif kind == "rings":
            draw.ellipse(
                (start / 2, start / 2, _SIDE - start / 2, _SIDE - start / 2), outline=colour, width=width // 2
            )
        else:
            for other in range(0, _SIDE, 2 * width):
                shift = width if kind == "check" and (start // (2 * width)) % 2 else 0
                box = (start, other + shift, start + width, other + shift + width)
                (draw.ellipse if kind == "dots" else draw.rectangle)(box, fill=colour)
    return picture


def _scene(random: np.random.Generator) -> Image.Image:
    """Sky, ground, sun, a house or trees."""
    night = bool(random.random() < 0.3)
    picture = Image.new("RGB", (_SIDE, _SIDE), "midnightblue" if night else "skyblue")
    draw = ImageDraw.Draw(picture)
    horizon = int(random.integers(110, 170))
    draw.rectangle(
        (0, horizon, _SIDE, _SIDE), fill=str(random.choice(("green", "navajowhite", "royalblue", "white")))
    )
    x = int(random.integers(20, 180))
    draw.ellipse((x, 15, x + 34, 49), fill="white" if night else "gold")
    for _ in range(int(random.integers(1, 4))):
        x, size = int(random.integers(10, 170)), int(random.integers(24, 60))
        if random.random() < 0.5:
            draw.rectangle((x, horizon - size, x + size, horizon + 6), fill=str(random.choice(_COLOURS)))
            draw.polygon(
                (
                    (x - 6, horizon - size),
                    (x + size / 2, horizon - 1.7 * size),
                    (x + size + 6, horizon - size),
                ),
                fill="brown",
            )
        else:
            draw.rectangle(
                (x + size * 0.4, horizon - size * 0.5, x + size * 0.6, horizon + 8), fill="saddlebrown"
            )
            draw.ellipse((x, horizon - 1.5 * size, x + size, horizon - 0.4 * size), fill="darkgreen")
    return picture


def _face(random: np.random.Generator, turn: int) -> Image.Image:
    """Glad or sad, on each ground, of each colour."""
    picture = Image.new("RGB", (_SIDE, _SIDE), _GROUNDS[turn % len(_GROUNDS)])
    draw = ImageDraw.Draw(picture)
    draw.ellipse(
        (40, 30, 184, 194),
        fill=("gold", "peachpuff", "tan", "lightgreen")[turn % 4],
        outline="black",
        width=3,
    )
    for x in (85, 130):
        draw.ellipse((x, 80, x + 14, 100), fill="black")
    start, end = (20, 160) if random.random() < 0.6 else (200, 340)
    draw.arc((80, 115, 146, 165), start, end, fill="black", width=5)
    return picture


def _texture(random: np.random.Generator, grain: int) -> Image.Image:
    cells = random.integers(0, 256, (_SIDE // grain + 1, _SIDE // grain + 1, 3), dtype=np.uint8)
    if random.random() < 0.4:
        cells[..., 1:] = cells[..., :1]
    return Image.fromarray(cells).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
