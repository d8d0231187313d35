"""Images of every kind become the same message; wrong ones fail with a class of their own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cliptune.errors import CliptuneError, ImageDecodeError, ImageSizeError, InvalidInputError, TensorError
from cliptune.images import image_message, is_one_image
from cliptune.tensors import unpack
from tests.support import images

PIXELS = np.asarray(images.draw(size=24))


def test_a_file_travels_as_its_own_bytes(tmp_path: Path) -> None:
    data = images.jpeg()
    (tmp_path / "a.jpg").write_bytes(data)
    for given in (tmp_path / "a.jpg", str(tmp_path / "a.jpg"), data, bytearray(data), memoryview(data)):
        assert image_message(given).encoded == data


@pytest.mark.parametrize(
    "given",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS[:, :, ::-1][:, :, ::-1],
        torch.from_numpy(PIXELS.copy()),
        torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    ],
    ids=["pillow", "numpy", "strided", "torch HWC", "torch CHW"],
)
def test_pixels_travel_without_loss(given: Any) -> None:
    np.testing.assert_array_equal(unpack(image_message(given).pixels), PIXELS)


def test_floating_point_of_any_width_travels_as_float32() -> None:
    scaled = PIXELS / 255
    for given in (scaled, scaled.astype(np.float32), torch.from_numpy(scaled).permute(2, 0, 1)):
        sent = unpack(image_message(given).pixels)
        assert sent.dtype == np.float32
        np.testing.assert_allclose(sent, scaled, atol=1e-7)
    assert unpack(image_message(torch.zeros(3, 8, 8, dtype=torch.bfloat16)).pixels).shape == (8, 8, 3)


def test_grey_becomes_three_equal_channels() -> None:
    grey = PIXELS[:, :, 0]
    for given in (grey, grey[:, :, None], torch.from_numpy(grey.copy())[None], Image.fromarray(grey)):
        np.testing.assert_array_equal(unpack(image_message(given).pixels), np.stack([grey] * 3, axis=2))


def test_a_pillow_image_with_alpha_or_palette_is_sent_as_rgb() -> None:
    image = Image.fromarray(PIXELS)
    for mode in ("RGBA", "P", "L", "1"):
        assert list(image_message(image.convert(mode)).pixels.shape) == [24, 24, 3]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (b"", ImageDecodeError),
        (Image.open(io.BytesIO(images.truncated_jpeg())), ImageDecodeError),
        (Image.new("RGB", (0, 4)), ImageSizeError),
        (np.zeros((0, 4, 3), np.uint8), ImageSizeError),
        (np.zeros((3, 8, 8), np.uint8), TensorError),
        (np.zeros((2, 8, 8, 3), np.uint8), TensorError),
        (np.zeros(7, np.uint8), TensorError),
        (np.zeros((8, 8, 3), np.int32), TensorError),
        (np.full((8, 8, 3), np.nan, np.float32), TensorError),
        (np.full((8, 8, 3), 2.0, np.float32), TensorError),
        (np.full((8, 8, 3), -1.0, np.float32), TensorError),
        ("/nowhere/cat.jpg", InvalidInputError),
        ("a\0b", InvalidInputError),
        (Path("/"), InvalidInputError),
        (17, InvalidInputError),
        (None, InvalidInputError),
    ],
)
def test_what_is_no_image_is_refused_with_its_own_class(given: Any, error: type[CliptuneError]) -> None:
    with pytest.raises(error) as caught:
        image_message(given)
    assert type(caught.value) is error


def test_a_numpy_array_in_torch_order_is_told_how_to_turn() -> None:
    with pytest.raises(TensorError, match="transpose"):
        image_message(np.zeros((3, 8, 8), np.uint8))


def test_one_image_is_told_from_a_list_of_them() -> None:
    assert all(
        is_one_image(one) for one in ("a.jpg", b"x", PIXELS, torch.zeros(3, 8, 8), Image.new("L", (1, 1)))
    )
    assert not any(is_one_image(many) for many in (["a.jpg"], PIXELS[None], torch.zeros(2, 3, 8, 8)))
