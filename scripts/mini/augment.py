"""Random views of images on white, made on the device in one batch.

Enters: [B, 3, S, S] in 0 … 1. Leaves: [B, 3, R, R] in -1 … 1, what towers take. Called by the image steps.
Objects are moved, turned, mirrored, scaled, tinted; sometimes the white behind them becomes something else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.mini import trunk


def plain(images_BCSS: Tensor, size: int) -> Tensor:
    """As they are."""
    resized = F.interpolate(
        images_BCSS, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return _normalised(resized.clamp(0, 1))


def views(images_BCSS: Tensor, sizes: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """One random view of each image, the same in every size asked for."""
    count, device = len(images_BCSS), images_BCSS.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device=device) * (high - low) + low

    angle = uniform(-0.3, 0.3) * (uniform(0, 1) < 0.7)
    # Below 1 the object grows beyond the frame, above it shrinks.
    zoom = torch.exp(uniform(-0.35, 0.45))
    stretch = torch.exp(uniform(-0.15, 0.15))
    mirrored = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift_x, shift_y = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    rows = (cos * stretch * mirrored, -sin, shift_x, sin * mirrored, cos / stretch, shift_y)
    affine_B23 = torch.stack(rows, dim=1).view(count, 2, 3)
    largest = max(sizes)
    grid = F.affine_grid(affine_B23, [count, 3, largest, largest], align_corners=False)
    # Outside the image is white, so its darkness is sampled, and 0 there.
    moved = 1 - F.grid_sample(
        1 - images_BCSS, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )

    grey = moved.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1, 1, 1, 1) < 0.1, 0.0, uniform(0.4, 1.4, 1, 1, 1))
    tinted = grey + (moved - grey) * saturation
    tinted = tinted * (1 - 0.15 * uniform(0, 1, 3, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.4))
    coarse = torch.rand(count, 3, 3, 3, generator=generator, device=device)
    ground = F.interpolate(coarse, size=(largest, largest), mode="bicubic", align_corners=False).clamp(0, 1)
    strength = uniform(0, 0.8, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.3)
    tinted = tinted * (1 - strength * ground)
    contrast = uniform(0.7, 1.1, 1, 1, 1)
    tinted = ((tinted - 1) * contrast + 1).clamp(0, 1)
    found = []
    for size in sizes:
        at_size = tinted
        if size != largest:
            at_size = F.interpolate(
                tinted, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
        found.append(_normalised(at_size))
    return tuple(found)


def _normalised(images_BCRR: Tensor) -> Tensor:
    mean, std = (images_BCRR.new_tensor(values).view(3, 1, 1) for values in (trunk.MEAN, trunk.STD))
    return (images_BCRR - mean) / std
