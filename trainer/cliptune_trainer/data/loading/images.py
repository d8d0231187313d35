"""The images of a batch as bytes, normalised on the device as they are asked for.

Enters: uint8 pixels from the decoder. Leaves: the model's float32 input, a slice at a time, so that a batch
of any size takes a byte a value and only a micro-batch four. Made by the loader and by evaluation, sliced by
the step.

B: images, b: images of a slice, H, W: height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cliptune_trainer.image.augment import GREY


class Normalisation:
    """What torchvision's `to_tensor` and `Normalize` make of bytes, the same operations in the same order.

    Args:
        mean, std: of each channel, on the scale of [0, 1].
        device: where the model is.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self._mean_311 = torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._grey_311 = torch.tensor(GREY, dtype=torch.float32, device=device).view(3, 1, 1)
        self._std_311 = torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1)

    @classmethod
    def of(cls, preprocess_config: Mapping[str, Any], device: torch.device) -> Normalisation:
        """As open_clip's form says."""
        return cls(preprocess_config["mean"], preprocess_config["std"], device)

    def __call__(self, pixels_bHW3: Tensor, mixes_b34: Tensor | None = None) -> Tensor:
        """[b, H, W, 3] uint8 → [b, 3, H, W] float32 on the device. With `mixes_b34` colours change first
        (`Augmentation.mixes`), within [0, 1]. Never waits for the device."""
        # From pinned memory the copy runs beside the host; elsewhere the flag would be unsafe or idle.
        beside = self.device.type == "cuda"
        bytes_b3HW = pixels_bHW3.to(self.device, non_blocking=beside).permute(0, 3, 1, 2).contiguous()
        images_b3HW = bytes_b3HW.float().div_(255)
        if mixes_b34 is not None:
            images_b3HW = self._mixed(images_b3HW, mixes_b34.to(self.device, non_blocking=beside))
        return images_b3HW.sub_(self._mean_311).div_(self._std_311)

    def _mixed(self, images_b3HW: Tensor, mixes_b34: Tensor) -> Tensor:
        # Sums of products, as a matrix product would be rounded to bf16 under autocast.
        mixes_b34HW = mixes_b34[..., None, None]
        grey_b111 = (images_b3HW.mean(dim=(2, 3), keepdim=True) * self._grey_311).sum(dim=1, keepdim=True)
        mixed_b3HW = (mixes_b34HW[:, :, 3] * grey_b111).expand_as(images_b3HW)
        for channel in range(3):
            mixed_b3HW = mixed_b3HW + mixes_b34HW[:, :, channel] * images_b3HW[:, channel : channel + 1]
        return mixed_b3HW.clamp_(0, 1)


class Images:
    """A batch's images: a slice of them is [b, 3, H, W] float32 on the device, computed anew each time.

    Args:
        pixels_BHW3: uint8, on the device already or in the CPU's memory.
        normalisation: of the model.
        mixes_B34: float32; how colours change. None: not at all.
    """

    def __init__(
        self, pixels_BHW3: Tensor, normalisation: Normalisation, mixes_B34: Tensor | None = None
    ) -> None:
        self._pixels_BHW3, self._normalisation, self._mixes_B34 = pixels_BHW3, normalisation, mixes_B34

    def __len__(self) -> int:
        return len(self._pixels_BHW3)

    @property
    def shape(self) -> torch.Size:
        """(B, 3, H, W)."""
        count, height, width, channels = self._pixels_BHW3.shape
        return torch.Size((count, channels, height, width))

    def __getitem__(self, part: slice) -> Tensor:
        mixes_b34 = None if self._mixes_B34 is None else self._mixes_B34[part]
        return self._normalisation(self._pixels_BHW3[part], mixes_b34)

    def to(self, device: torch.device | str) -> Tensor:
        """All of them at once, on `device`."""
        return self[:].to(device)
