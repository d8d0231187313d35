"""Positions of patches for images of another size: a product with a fixed matrix.

Enters: position embeddings as they were trained, their grid, and the grid that is wanted. Leaves: embeddings
for that grid, through which gradients reach the trained ones. Called by `image_tower`.

Bicubic interpolation with antialiasing (as open_clip and timm resize checkpoints) is linear and separable:
one small matrix down, one across, computed once. A product has a backward pass on every device, which the
interpolation itself has not. Always from the trained grid, so that going from size to size loses nothing.

Shape suffixes: P prefix tokens, h, w: trained grid, H, W: wanted grid, D width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

Grid = tuple[int, int]  # patches down, patches across


def resized_positions(positions: Tensor, *, prefix: int, trained: Grid, wanted: Grid) -> Tensor:
    """[..., P + h·w, D] → [..., P + H·W, D], in the dtype of `positions`; computed in fp32 at least.

    `prefix` tokens (class, registers) come first and stay as they are. Equal grids: `positions` itself.
    """
    if trained == wanted:
        return positions
    (height, width), (new_height, new_width) = trained, wanted
    precise = torch.float64 if positions.dtype == torch.float64 else torch.float32
    device = positions.device
    with torch.autocast(device.type, enabled=False):
        grid_hwD = positions[..., prefix:, :].to(precise).reshape(height, width, -1)
        # What only counts bytes must not be remembered among numbers.
        matrix = _axis_matrix if isinstance(positions, FakeTensor) else axis_matrix
        down_Hh = matrix(height, new_height, precise, device)
        across_Ww = matrix(width, new_width, precise, device)
        rows_HwD = (down_Hh @ grid_hwD.flatten(1)).view(new_height, width, -1)
        grid_HWD = across_Ww @ rows_HwD
        grid = grid_HWD.reshape(*positions.shape[:-2], new_height * new_width, -1).to(positions.dtype)
    return torch.cat([positions[..., :prefix, :], grid], dim=-2)


@lru_cache(maxsize=256)
def axis_matrix(trained: int, wanted: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[wanted, trained]: bicubic interpolation along one axis, antialiased, corners not aligned. Cached."""
    return _axis_matrix(trained, wanted, dtype, device)


def _axis_matrix(trained: int, wanted: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Not an inference tensor even where the first call is under inference mode: later ones may train.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        # Across: for images one pixel wide torch's pass down repeats its first row.
        basis = torch.eye(trained, dtype=torch.float64)[:, None, None, :]
        rows = F.interpolate(basis, (1, wanted), mode="bicubic", antialias=True, align_corners=False)
        return rows[:, 0, 0, :].T.to(dtype).contiguous().to(device)
