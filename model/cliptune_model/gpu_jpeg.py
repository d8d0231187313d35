"""JPEG files decoded and resized on the GPU: nvJPEG, then the transform's own steps.

Enters: a `Clip`, and bytes of files. Leaves: preprocessed images on the device. Part of the fast way of
decoding (`fidelity.py` measures how far it is from the exact one); used by the engine beside its threads,
which take what this does not: other formats, CMYK, and whatever is not whole, for a damaged file is to get
the error of the usual decoder.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune_model.clip import Clip
from cliptune_model.pixels import DEFAULT_LIMITS
from cliptune_model.quiet import Quiet

_MODES: Final = ("RGB", "L")
_START, _END = b"\xff\xd8", b"\xff\xd9"
_quiet_pillow: Final = Quiet(r"PIL\.")
# Its decoders are to move to a package of their own; `why_not` tells when they have.
_quiet_torchvision: Final = Quiet(r"torchvision\.io")


class GpuJpeg:
    """Decodes for one model on one device; "cpu" too, by libjpeg, where tests compare the steps."""

    def __init__(self, clip: Clip, device: str | torch.device) -> None:
        config = clip.preprocess_config
        self._size: Final = clip.image_size
        self._device: Final = torch.device(device)
        self._squash: Final = config.get("resize_mode") == "squash"
        self._mode: Final = str(config.get("interpolation") or "bicubic")
        mean, std = (torch.tensor(config[name], device=self._device) for name in ("mean", "std"))
        self._mean_C11: Final = 255.0 * mean.view(-1, 1, 1)
        self._std_C11: Final = 255.0 * std.view(-1, 1, 1)

    @staticmethod
    def why_not(clip: Clip) -> str:
        """Why the transform of this model has no such steps; "": it has."""
        try:
            # torchvision will drop it some day.
            from torchvision.io import decode_jpeg  # type: ignore[import-untyped]  # noqa: F401
        except ImportError:
            return "this torchvision has no JPEG decoder for GPUs"
        config = clip.preprocess_config
        mode, interpolation = config.get("resize_mode") or "shortest", config.get("interpolation")
        if mode not in ("shortest", "squash") or interpolation not in (None, "bicubic", "bilinear"):
            return f"its transform resizes by {mode!r} with {interpolation!r}"
        if mode == "shortest" and clip.image_size[0] != clip.image_size[1]:
            return "its images are not square"
        return ""

    def takes(self, encoded: bytes) -> bool:
        """Whether these are a whole JPEG file of a usual kind, within the limits. Reads the header alone."""
        if not encoded.startswith(_START) or not encoded.rstrip(b"\0").endswith(_END):
            return False
        try:
            with _quiet_pillow, PIL.Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
                DEFAULT_LIMITS.check(image.width, image.height)
                return image.mode in _MODES
        except Exception:  # whatever is wrong with it, the usual decoder says
            return False

    @torch.inference_mode()
    def read(self, files: Sequence[bytes]) -> list[Tensor]:
        """Files that it takes → [3, H, W] each, on the device.

        Raises:
            RuntimeError: one of them cannot be decoded; which one is not told.
        """
        encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        pixels = _decoded(encoded, self._device)
        images_NCHW = torch.stack([self._resized(one_CHW) for one_CHW in pixels])
        return list(images_NCHW.sub_(self._mean_C11).div_(self._std_C11))

    def _resized(self, pixels_CHW: Tensor) -> Tensor:
        """As torchvision's Resize and CenterCrop: [3, H', W'] uint8 → [3, H, W] float32 of 0 to 255."""
        height, width = self._size
        before_h, before_w = pixels_CHW.shape[-2:]
        to_h, to_w = height, width
        if not self._squash:
            short = min(before_h, before_w)
            to_h, to_w = height * before_h // short, width * before_w // short
        resized: Tensor = F.interpolate(
            pixels_CHW[None].float(), size=(to_h, to_w), mode=self._mode, antialias=True, align_corners=False
        )[0]
        top, left = round((to_h - height) / 2), round((to_w - width) / 2)
        return resized[:, top : top + height, left : left + width].round().clamp_(0.0, 255.0)


def _decoded(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    with _quiet_torchvision:
        found: Any = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return list(found)
