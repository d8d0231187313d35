from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import torch

from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def clip() -> Clip:
    """Shared: not to be changed."""
    return build(ModelSource(name="cliptune-test-vit"), seed=3)


def photo(width: int = 90, height: int = 70, seed: int = 0) -> PIL.Image.Image:
    """A smooth RGB image with structure, as photographs have."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)


def encoded(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file of this format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
