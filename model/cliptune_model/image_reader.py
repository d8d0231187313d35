"""From what a caller sent to what the image tower takes: exactly as open_clip does, or faster.

Enters: bytes of an image file, or pixels. Leaves: [3, H, W] float32, preprocessed. Made by the engine for
each model that it loads.

- exact: open_clip's transform, bit by bit. Pixels that have the tower's size already skip what would not
  change them.
- fast: a JPEG that is much larger than the tower's size is decoded at a half, a quarter or an eighth of its
  size (libjpeg-turbo's DCT scaling) before it is resized. `fidelity.py` measures what that changes. Beside
  a GPU, some files may be decoded there (`gpu`), as the engine shares them out.

Shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_model.gpu_jpeg import GpuJpeg
from cliptune_model.pixels import decode_image, decode_scaled, image_from_pixels

DECODES: Final = ("exact", "fast")


class ImageReader:
    """Reads images for one model."""

    def __init__(self, clip: Clip, *, fast: bool = False, gpu: GpuJpeg | None = None) -> None:
        """`gpu`: what may read files too, as near to the exact way as was found enough."""
        self.fast: Final = fast
        self.gpu: Final = gpu
        self._clip: Final = clip
        self._resize_mode: Final = str(clip.preprocess_config.get("resize_mode") or "shortest")
        self._mean_C11: Final = _column(clip.preprocess_config["mean"])
        self._std_C11: Final = _column(clip.preprocess_config["std"])

    def encoded(self, encoded: bytes) -> Tensor:
        """Bytes of a file → [3, H, W]. Errors of `decode_image`."""
        if not self.fast:
            return self._clip.preprocess(decode_image(encoded))
        image, _ = decode_scaled(encoded, self._enough)
        return self._clip.preprocess(image)

    def pixels(self, pixels: np.ndarray[Any, Any]) -> Tensor:
        """[H, W, 3] RGB, uint8 or float32 in [0, 1] → [3, H, W]. Errors of `image_from_pixels`."""
        if pixels.dtype == np.uint8 and pixels.shape == (*self._clip.image_size, 3):
            # What is left of the transform: nothing to resize, nothing to crop.
            scaled_CHW = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous().float().div_(255)
            return scaled_CHW.sub_(self._mean_C11).div_(self._std_C11)
        return self._clip.preprocess(image_from_pixels(pixels))

    def _enough(self, width: int, height: int) -> tuple[int, int]:
        """The size that resizing brings an image to; a decoded one must not be smaller."""
        to_height, to_width = self._clip.image_size
        if self._resize_mode == "squash":
            return to_width, to_height
        pick = max if self._resize_mode == "shortest" else min
        scale = pick(to_width / width, to_height / height)
        return math.ceil(width * scale), math.ceil(height * scale)


def _column(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
