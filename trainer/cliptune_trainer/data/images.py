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


class Normalisation:
    """What torchvision's `to_tensor` and `Normalize` make of bytes, the same operations in the same order.

    Args:
        mean, std: of each channel, on the scale of [0, 1].
        device: where the model is.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self._mean_311 = torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._std_311 = torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1)

    @classmethod
    def of(cls, preprocess_config: Mapping[str, Any], device: torch.device) -> Normalisation:
        """As open_clip's form says."""
        return cls(preprocess_config["mean"], preprocess_config["std"], device)

    def __call__(self, pixels_bHW3: Tensor, flips_b: Tensor | None = None) -> Tensor:
        """[b, H, W, 3] uint8 → [b, 3, H, W] float32 on the device. Where `flips_b`, left and right change
        places. Never waits for the device."""
        # From pinned memory the copy runs beside the host; elsewhere the flag would be unsafe or idle.
        beside = self.device.type == "cuda"
        bytes_b3HW = pixels_bHW3.to(self.device, non_blocking=beside).permute(0, 3, 1, 2).contiguous()
        if flips_b is not None:
            flips_b111 = flips_b.to(self.device, non_blocking=beside).view(-1, 1, 1, 1)
            bytes_b3HW = torch.where(flips_b111, bytes_b3HW.flip(-1), bytes_b3HW)
        return bytes_b3HW.float().div_(255).sub_(self._mean_311).div_(self._std_311)


class Images:
    """A batch's images: a slice of them is [b, 3, H, W] float32 on the device, computed anew each time.

    Args:
        pixels_BHW3: uint8, on the device already or in the CPU's memory.
        normalisation: of the model.
        flips_B: bool; which images are mirrored. None: none.
    """

    def __init__(
        self, pixels_BHW3: Tensor, normalisation: Normalisation, flips_B: Tensor | None = None
    ) -> None:
        self._pixels_BHW3, self._normalisation, self._flips_B = pixels_BHW3, normalisation, flips_B

    def __len__(self) -> int:
        return len(self._pixels_BHW3)

    @property
    def shape(self) -> torch.Size:
        """(B, 3, H, W)."""
        count, height, width, channels = self._pixels_BHW3.shape
        return torch.Size((count, channels, height, width))

    def __getitem__(self, part: slice) -> Tensor:
        flips_b = None if self._flips_B is None else self._flips_B[part]
        return self._normalisation(self._pixels_BHW3[part], flips_b)

    def to(self, device: torch.device | str) -> Tensor:
        """All of them at once, on `device`."""
        return self[:].to(device)
