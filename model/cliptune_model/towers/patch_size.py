"""Another patch size for a ViT that was trained with one: the weights that answer most alike.

Enters: open_clip's model with its weights, and the side of a patch. Leaves: the same model with patches of
that side, and its configuration. Called by `cliptune_model.clip.build`.

Beyer et al. 2023 (FlexiViT), section 3.4: with B the matrix that resizes a patch, the new weights are
ŵ = (Bᵀ)⁺ w, so that a resized patch times ŵ is the patch times w; exactly where patches grow. Smaller patches
make a finer grid and longer sequences; positions are resized with the grid.

Shape suffixes: W width, C channels, p, q: sides of the trained and the new patch.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from cliptune.errors import SpecError
from cliptune_model.towers.positions import axis_matrix, resized_positions


def change_patch_size(
    model: nn.Module, model_config: dict[str, Any], patch_size: int, *, name: str
) -> dict[str, Any]:
    """Give `model` patches of `patch_size` pixels, in place; returns its new configuration.

    A model that has exactly these is left as it is.

    Raises:
        SpecError: the tower is not open_clip's ViT, or the patch does not divide the model's image size.
    """
    visual: Any = model.visual
    if not isinstance(visual, VisionTransformer):
        told = f"{type(visual).__name__} of {name!r} has no patches that can be resized"
        raise SpecError(f"model.patch_size = {patch_size}: {told}", path="model.patch_size", allowed="none")
    if tuple(visual.patch_size) == (patch_size, patch_size):
        return model_config
    height, width = visual.image_size
    if patch_size < 1 or height % patch_size or width % patch_size:
        divisors = [
            side for side in range(4, min(height, width) + 1) if not height % side and not width % side
        ]
        allowed = ", ".join(map(str, divisors))
        raise SpecError(
            f"model.patch_size is {patch_size}; {name!r} sees {height} × {width} pixels; allowed: {allowed}",
            path="model.patch_size",
            allowed=allowed,
        )
    trained, grid = visual.grid_size, (height // patch_size, width // patch_size)
    with torch.no_grad():
        old: Any = visual.conv1
        weight_WCqq = resized_patches(old.weight, patch_size)
        convolution = nn.Conv2d(
            old.in_channels, old.out_channels, patch_size, patch_size, bias=old.bias is not None
        ).to(old.weight)
        convolution.weight.copy_(weight_WCqq)
        if old.bias is not None and convolution.bias is not None:
            convolution.bias.copy_(old.bias)
        positions = visual.positional_embedding
        visual.positional_embedding = nn.Parameter(
            resized_positions(positions, prefix=1, trained=trained, wanted=grid).detach().clone(),
            requires_grad=positions.requires_grad,
        )
    convolution.requires_grad_(old.weight.requires_grad)
    visual.conv1, visual.patch_size, visual.grid_size = convolution, (patch_size, patch_size), grid
    changed = deepcopy(model_config)
    changed["vision_cfg"]["patch_size"] = patch_size
    return changed


def resized_patches(weight_WCpp: Tensor, side: int) -> Tensor:
    """[W, C, p, p] → [W, C, q, q] by the pseudo-inverse of bicubic resizing, one axis after the other."""
    trained = weight_WCpp.shape[-1]
    # The resize is a Kronecker product of its axes, and so is its pseudo-inverse.
    resize_qp = axis_matrix(trained, side, torch.float64, torch.device("cpu"))
    inverse_qp = torch.linalg.pinv(resize_qp.T)
    precise = weight_WCpp.detach().to("cpu", torch.float64)
    resized_WCqq: Tensor = inverse_qp @ precise @ inverse_qp.T
    return resized_WCqq.to(weight_WCpp)
