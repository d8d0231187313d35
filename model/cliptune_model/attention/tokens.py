"""How many tokens an image makes.

Enters: a `Clip`. Leaves: the length of the sequence that its image tower attends over. Called by the device
policy and the memory plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cliptune_model.towers.image_tower import tokens_at

if TYPE_CHECKING:
    from cliptune_model.clip import Clip

# ResNets pool a grid of this many pixels a cell with attention; what else has no sequence is counted where
# its grid is finest, for its dense layers see each cell as a row.
_RESNET_STRIDE = 32
_FINEST_STRIDE = 4


def image_tokens(clip: Clip) -> int:
    """Tokens of one image at the clip's image size, class and register tokens included.

    For towers without a sequence (convolutional ones) it is the number of cells of their finest grid.
    """
    placed = tokens_at(clip.model, clip.image_size)
    if placed is not None:
        return placed
    visual = clip.model.get_submodule("visual")
    trunk = getattr(visual, "trunk", visual)
    positions = getattr(trunk, "pos_embed", None)
    if isinstance(positions, Tensor) and positions.dim() == 3:  # of a tower that takes one size
        return positions.shape[-2] + _unplaced(trunk, positions.shape[-2])
    height, width = clip.image_size
    patches = getattr(getattr(trunk, "patch_embed", None), "num_patches", None)
    if patches is not None:
        return int(patches) + int(getattr(trunk, "num_prefix_tokens", 0))
    pooled = isinstance(getattr(visual, "attnpool", None), nn.Module)
    stride = _RESNET_STRIDE if pooled else _FINEST_STRIDE
    return (height // stride) * (width // stride) + int(pooled)


def _unplaced(trunk: nn.Module, placed: int) -> int:
    """Prefix tokens (class, registers) that have no position of their own in timm's towers."""
    patches = getattr(getattr(trunk, "patch_embed", None), "num_patches", None)
    prefix = int(getattr(trunk, "num_prefix_tokens", 0))
    return max(0, int(patches) + prefix - placed) if patches is not None else 0
