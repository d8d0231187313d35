"""Images of every common kind → `cliptune.v1.Image`.

In: a path, the bytes of an image file, a Pillow image, a numpy array or a torch tensor. Out: a message that
holds either the file's bytes as they are (the daemon decodes) or raw pixels, never a lossy copy. Pillow and
torch are recognised by the object's type, never imported. Called by `inference_codec.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cliptune.errors import ImageDecodeError, ImageSizeError, InvalidInputError, TensorError
from cliptune.tensors import check_finite, pack
from cliptune.v1 import tensor_pb2

# A Pillow image and a torch tensor are `Any` here: the light client knows neither package.
ImageInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | npt.NDArray[Any] | Any


def image_message(image: ImageInput) -> tensor_pb2.Image:
    """One image as a message.

    - path: its file's bytes; `InvalidInputError` when it cannot be read.
    - bytes of a JPEG, PNG, WebP, ... file.
    - Pillow image: its pixels in RGB (alpha is dropped, as open_clip does); `ImageDecodeError` when its file
      turns out to be broken.
    - numpy array [H, W, 3] or grey [H, W], torch tensor [3, H, W], [H, W, 3] or [H, W]: uint8 0-255, or
      floating point in [0, 1]. `TensorError` for another shape, dtype or value, `ImageSizeError` without
      pixels.

    An image that is already a message passes unchanged. `InvalidInputError` for anything else.
    """
    if isinstance(image, tensor_pb2.Image):
        return image
    if isinstance(image, str | os.PathLike):
        return _encoded(_read(image), f"the file {os.fspath(image)!r}")
    if isinstance(image, bytes | bytearray | memoryview):
        return _encoded(bytes(image), "the image")
    if isinstance(image, np.ndarray):
        return _pixels(image)
    if _is_from("PIL", image) and hasattr(image, "convert"):
        return _pixels(_pillow_pixels(image))
    if _is_from("torch", image) and hasattr(image, "detach"):
        return _pixels(_torch_pixels(image))
    kind = type(image).__name__
    raise InvalidInputError(
        f"an image is a path, bytes, a Pillow image, a numpy array or a torch tensor, not {kind}", type=kind
    )


def is_one_image(images: object) -> bool:
    """Whether this is a single image where a list of them was asked for."""
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | tensor_pb2.Image):
        return True
    dimensions = getattr(images, "ndim", None)
    if isinstance(dimensions, int):
        return dimensions < 4
    return _is_from("PIL", images) and hasattr(images, "convert")


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInputError(
            f"the image {os.fspath(path)!r} cannot be read: {reason}", path=path
        ) from error


def _encoded(data: bytes, what: str) -> tensor_pb2.Image:
    if not data:
        raise ImageDecodeError(f"{what} is empty")
    return tensor_pb2.Image(encoded=data)


def _is_from(package: str, value: object) -> bool:
    return any(cls.__module__.partition(".")[0] == package for cls in type(value).__mro__)


def _pillow_pixels(image: Any) -> npt.NDArray[Any]:
    if 0 in image.size:
        raise ImageSizeError("the image has no pixels", width=image.size[0], height=image.size[1])
    try:
        # Pillow reads its file only now; a broken one shows as one of these.
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageDecodeError(f"Pillow cannot decode the image: {error}") from error


def _torch_pixels(tensor: Any) -> npt.NDArray[Any]:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such dtype
        tensor = tensor.float()
    array: npt.NDArray[Any] = tensor.numpy()
    # torch's own order is [3, H, W]; where both readings fit, it holds.
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)
    return array


def _pixels(array: npt.NDArray[Any]) -> tensor_pb2.Image:
    shape = list(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3:
        hint = "; a numpy array in [3, H, W] needs .transpose(1, 2, 0)" if shape[:1] == [3] else ""
        raise TensorError(f"pixels have shape {shape}, not [height, width, 3]{hint}", shape=shape)
    if 0 in array.shape:
        raise ImageSizeError(f"the image has no pixels: {shape}", width=shape[1], height=shape[0])
    if array.dtype == np.uint8:
        return tensor_pb2.Image(pixels=pack(array))
    if array.dtype.kind != "f":
        raise TensorError(
            f"pixels have dtype {array.dtype}; allowed: uint8 0-255 or floating point in [0, 1]",
            dtype=array.dtype,
        )
    check_finite(array, "pixels")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise TensorError(
            f"floating-point pixels lie in [0, 1], and these in [{low:g}, {high:g}]: send them before "
            "normalisation, or as uint8 0-255"
        )
    return tensor_pb2.Image(pixels=pack(array.astype(np.float32)))
