"""Image bytes of every kind, whole and broken."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from cliptune.errors import ImageDecodeError, ImageSizeError, InvalidInputError, TensorError
from cliptune_model.clip import Clip
from cliptune_model.pixels import FORMATS, PixelLimits, decode_image, image_from_pixels
from tests.model.conftest import encoded, photo


def png(width: int, height: int, *, depth: int = 8, rows: bytes = b"") -> bytes:
    """A PNG with this header and whatever rows are given: what a decompression bomb looks like."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_to_loaded_rgb_as_pillow_decodes_it(kind: str) -> None:
    data = encoded(photo(), kind)
    image = decode_image(data)
    assert image.mode == "RGB"
    assert np.array_equal(image, PIL.Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_converted_as_pillow_converts_it(mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    data = encoded(photo().convert(mode), kind)
    assert np.array_equal(decode_image(data), PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_palette_with_transparency_decodes_without_a_warning() -> None:
    palette = photo().quantize(16)
    data = encoded(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    assert np.array_equal(decode_image(data), palette.convert("RGB"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_a_decode_error(kind: str) -> None:
    data = encoded(photo(24, 20), kind)
    for end in range(0, len(data) - 24, 7):
        with pytest.raises(ImageDecodeError):
            decode_image(data[:end])


def test_truncated_images_are_never_padded() -> None:
    import open_clip  # noqa: F401  what we import must not have switched it on

    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "kind", [kind for kind in FORMATS if kind != "TIFF"]
)  # libtiff writes to stderr itself
def test_flipped_bytes_end_in_an_image_or_an_error_of_ours(kind: str) -> None:
    random = np.random.default_rng(5)
    data = np.frombuffer(encoded(photo(40, 30), kind), np.uint8)
    for _ in range(150):
        broken = data.copy()
        where = random.integers(0, min(len(data), random.choice([64, len(data)])), size=random.integers(1, 6))
        broken[where] = random.integers(0, 256, size=len(where))
        # Some damage still leaves an image. The context lets only errors of these two classes pass.
        with contextlib.suppress(ImageDecodeError, ImageSizeError):
            assert decode_image(broken.tobytes()).mode == "RGB"


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello, this is text", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"]
)
def test_what_is_no_image_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(ImageDecodeError):
        decode_image(data)


def test_a_decompression_bomb_is_refused_by_its_header_alone() -> None:
    with pytest.raises(ImageSizeError, match="30,000 × 30,000"):
        decode_image(png(30_000, 30_000))
    with pytest.raises(ImageSizeError) as caught:
        decode_image(png(10_500, 10_500))
    assert caught.value.metadata == {"width": "10500", "height": "10500", "limit": "100000000"}


def test_an_image_between_pillows_limit_and_ours_decodes_without_a_warning() -> None:
    side = 9_600  # 92 million pixels; Pillow warns from 89.5 million on
    row = b"\0" + b"\0" * ((side + 7) // 8)
    assert decode_image(png(side, side, depth=1, rows=row * side)).size == (side, side)


def test_a_side_of_50_000_pixels_is_refused() -> None:
    with pytest.raises(ImageSizeError, match="50,000") as caught:
        decode_image(encoded(PIL.Image.new("RGB", (50_000, 1)), "PNG"))
    assert caught.value.metadata["width"] == "50000"
    with pytest.raises(ImageSizeError):
        decode_image(png(1, 50_000))


def test_an_image_without_pixels_is_refused() -> None:
    bmp = bytearray(encoded(PIL.Image.new("L", (1, 1)), "BMP"))
    bmp[18:22] = b"\0\0\0\0"
    for data in (png(0, 5), png(5, 0), bytes(bmp)):
        with pytest.raises(ImageSizeError, match="no pixels"):
            decode_image(data)
    with pytest.raises(ImageSizeError, match="no pixels"):
        image_from_pixels(np.zeros((0, 4, 3), np.uint8))


def test_limits_are_the_callers_and_are_checked() -> None:
    with pytest.raises(ImageSizeError, match="at most 100"):
        decode_image(encoded(photo(), "PNG"), PixelLimits(max_pixels=100))
    with pytest.raises(ImageSizeError, match="a side is at most 80"):
        decode_image(encoded(photo(), "PNG"), PixelLimits(max_side=80))
    with pytest.raises(InvalidInputError):
        PixelLimits(max_side=0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte_instead_of_turning_white(kind: str) -> None:
    grey = np.asarray(photo().convert("L"))
    deep = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert np.array_equal(np.asarray(decode_image(encoded(deep, kind)))[..., 0], grey)
    assert np.asarray(deep.convert("RGB")).mean() > 240 > grey.mean()  # the trap that is avoided


def test_float_and_32_bit_grey_are_read_by_their_range() -> None:
    grey = np.asarray(photo().convert("L"))
    for array in (grey.astype(np.float32) / 255, grey.astype(np.float32), grey.astype(np.int32)):
        decoded = decode_image(encoded(PIL.Image.fromarray(array), "TIFF"))
        assert np.array_equal(np.asarray(decoded)[..., 1], grey)
    for array in (
        grey.astype(np.float32) - 300,
        np.full((4, 4), np.nan, np.float32),
        grey.astype(np.int32) * 70_000,
    ):
        with pytest.raises(ImageDecodeError, match="pixels"):
            decode_image(encoded(PIL.Image.fromarray(array), "TIFF"))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [photo(seed=seed) for seed in range(3)]
    for kind, options in (("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        first = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        assert np.array_equal(decode_image(data), first)


def test_exif_orientation_is_left_alone_as_open_clip_leaves_it(clip: Clip) -> None:
    image = photo(60, 30)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif)
    assert decode_image(data).size == (60, 30)
    assert bool(
        (clip.preprocess(decode_image(data)) == clip.preprocess(PIL.Image.open(io.BytesIO(data)))).all()
    )


def test_threads_that_decode_leave_the_warning_filters_as_they_were() -> None:
    data = encoded(photo().quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
    before = list(warnings.filters)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(40):
                decode_image(data)
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert list(warnings.filters) == before


def test_raw_pixels_become_the_same_image_as_a_file() -> None:
    pixels = np.asarray(photo())
    assert np.array_equal(image_from_pixels(pixels), pixels)
    assert np.array_equal(image_from_pixels(pixels.astype(np.float32) / 255), pixels)
    assert np.array_equal(image_from_pixels(pixels[::-1, ::2]), pixels[::-1, ::2])


@pytest.mark.parametrize(
    ("pixels", "complaint"),
    [
        (np.zeros((4, 4), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.float64), "float64"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.full((4, 4, 3), np.nan, np.float32), "NaN"),
        (np.full((4, 4, 3), np.inf, np.float32), "infinity"),
        (np.full((4, 4, 3), 1.5, np.float32), r"\[0, 1\]"),
        (np.full((4, 4, 3), -0.1, np.float32), r"\[0, 1\]"),
    ],
)
def test_raw_pixels_of_the_wrong_kind_are_a_tensor_error(pixels: np.ndarray, complaint: str) -> None:
    with pytest.raises(TensorError, match=complaint):
        image_from_pixels(pixels)


def test_raw_pixels_that_are_too_wide_are_a_size_error() -> None:
    with pytest.raises(ImageSizeError, match="50,000"):
        image_from_pixels(np.zeros((1, 50_000, 3), np.uint8))
