"""Photo-like JPEGs of 640 × 480, in tar shards and as single files: what a loader is measured on.

Noise of every scale, as strong as in photographs: about 59 KB at quality 85. Few are distinct, since a
decoder remembers nothing from one to the next.
"""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 640, 480, 85
DISTINCT = 32
SHARD_ROWS = 1000
# Twenty-one tokens with those of start and end: trimmed to 24.
CAPTION = "a dog and a cat and a bird on a green lawn by a red house in the sun"


def photo(seed: int) -> bytes:
    """A JPEG file."""
    random = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), 120.0, np.float32)
    for across in (4, 8, 16, 32, 64, 128, 256):
        grain = random.integers(0, 256, (max(across * HEIGHT // WIDTH, 2), across, 3), dtype=np.uint8)
        layer = Image.fromarray(grain).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, np.float32) - 128) * (1.6 / across**0.55)
    pixels += random.normal(0, 3.5, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_photos(folder: Path, rows: int) -> tuple[Path, Path, float]:
    """Writes `rows` rows as shards and, the same, as a TSV file with single images.

    Returns:
        The folder of shards, the TSV file, and a file's mean size in bytes.
    """
    photos = [photo(seed) for seed in range(min(rows, DISTINCT))]
    shards, files, table = folder / "shards", folder / "files", folder / "photos.tsv"
    shards.mkdir()
    files.mkdir()
    with table.open("w", newline="") as text:
        writer = csv.writer(text, delimiter="\t")
        writer.writerow(["image", "caption"])
        for start in range(0, rows, SHARD_ROWS):
            with tarfile.open(shards / f"{start // SHARD_ROWS:05d}.tar", "w") as tar:
                for row in range(start, min(start + SHARD_ROWS, rows)):
                    encoded = photos[row % len(photos)]
                    _add(tar, f"{row:08d}.jpg", encoded)
                    _add(tar, f"{row:08d}.txt", f"{CAPTION} {row % 10}".encode())
                    file = files / f"{row:08d}.jpg"
                    file.write_bytes(encoded)
                    writer.writerow([file, f"{CAPTION} {row % 10}"])
    return shards, table, float(np.mean([len(encoded) for encoded in photos]))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))
