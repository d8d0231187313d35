"""An image tower at any size: open_clip's ViTs and ResNets, timm's ViTs (SigLIP's too), convolutional towers.

Enters: open_clip's model and images of any size. Leaves: embeddings [B, D]. Called by `Clip` for every batch;
`image_sizes` asks here which sizes a tower takes. At the grid that the tower was trained with it
computes as open_clip does, to the bit; at another its positions are put in for the length of one pass
(`positions`). Weights, their names and exports never change.

Shape suffixes: B batch, H, W: image height and width, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from cliptune.errors import ImageSizeError
from cliptune_model.towers.positions import Grid, resized_positions

# Five halvings, as ResNets and their kin have.
_USUAL_STRIDE: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTower:
    """What of an image tower depends on the size of images.

    Attributes:
        step: (down, across) in pixels; sides of images are multiples of it.
        grid: the one that positions were trained for; None: the tower has none.
        holder, name: the module that holds the position embeddings, and their name there.
        prefix: embeddings of tokens that are no patches.
        patches: timm's module that makes patches, where it is one: it checks sizes, and knows the grid.
        why_fixed: why it takes one size alone; "": it takes any.
    """

    step: tuple[int, int]
    grid: Grid | None = None
    holder: nn.Module | None = None
    name: str = ""
    prefix: int = 0
    patches: Any = None
    why_fixed: str = ""

    def grid_at(self, size: tuple[int, int]) -> Grid:
        """The grid of an image of (height, width)."""
        return size[0] // self.step[0], size[1] // self.step[1]

    def takes(self, size: tuple[int, int]) -> bool:
        """Whether images of (height, width) make whole patches, at least one."""
        return all(side >= step and side % step == 0 for side, step in zip(size, self.step, strict=True))

    @contextmanager
    def at(self, grid: Grid) -> Iterator[None]:
        """Inside, the tower has positions for `grid`; one thread at a time."""
        if self.holder is None or self.grid is None or grid == self.grid:
            yield
            return
        own = self.holder._parameters[self.name]
        if own is None:
            raise RuntimeError(f"{self.name} is taken away")
        resized = resized_positions(own, prefix=self.prefix, trained=self.grid, wanted=grid)
        # Not a parameter: gradients go through it to the one that is put back.
        self.holder._parameters[self.name] = cast(nn.Parameter, resized)
        if self.patches is not None:
            # Its own check of the size is left out; and it finds nothing to resize, for which not every
            # device has a backward pass.
            strict, self.patches.strict_img_size, self.patches.grid_size = (
                self.patches.strict_img_size,
                False,
                grid,
            )
        try:
            yield
        finally:
            self.holder._parameters[self.name] = own
            if self.patches is not None:
                self.patches.strict_img_size, self.patches.grid_size = strict, self.grid


def image_tower(model: nn.Module) -> ImageTower:
    """The image tower of open_clip's `model`."""
    visual: Any = model.visual
    if isinstance(visual, VisionTransformer):
        return ImageTower(
            step=_pair(visual.patch_size),
            grid=_pair(visual.grid_size),
            holder=visual,
            name="positional_embedding",
            prefix=1,
        )
    if isinstance(visual, ModifiedResNet):
        height, width = _pair(visual.image_size)
        return ImageTower(
            step=(_USUAL_STRIDE, _USUAL_STRIDE),
            grid=(height // _USUAL_STRIDE, width // _USUAL_STRIDE),
            holder=visual.attnpool,
            name="positional_embedding",
            prefix=1,
        )
    if isinstance(visual, TimmModel):
        return _timm_tower(visual)
    told = f"{type(visual).__name__} is not known to take images of several sizes"
    return ImageTower(step=_pair(getattr(visual, "image_size", 1)), why_fixed=told)


def encode_image(model: nn.Module, images_B3HW: Tensor) -> Tensor:
    """[B, 3, H, W] → [B, D], not normalised, as open_clip computes it where the size is the trained one.

    Raises:
        ImageSizeError: sides that are no multiples of the patch, of a tower with positions.
    """
    encode: Any = model.encode_image
    tower = image_tower(model)
    height, width = images_B3HW.shape[-2:]
    grid = tower.grid_at((height, width))
    if tower.why_fixed or tower.grid is None or grid == tower.grid:
        return cast(Tensor, encode(images_B3HW, normalize=False))
    if not tower.takes((height, width)):
        down, across = tower.step
        raise ImageSizeError(
            f"images of {height} × {width}: the image tower takes multiples of {down} × {across} pixels",
            width=width,
            height=height,
            limit=down,
        )
    with tower.at(grid):
        return cast(Tensor, encode(images_B3HW, normalize=False))


def _timm_tower(visual: TimmModel) -> ImageTower:
    trunk: Any = visual.trunk
    positions, patches = getattr(trunk, "pos_embed", None), getattr(trunk, "patch_embed", None)
    name = type(trunk).__name__
    grid = getattr(patches, "grid_size", None)
    if patches is not None and isinstance(positions, Tensor) and positions.dim() == 3 and grid is not None:
        step = _pair(patches.patch_size)
        if getattr(trunk, "rope", None) is not None:
            return ImageTower(step=step, why_fixed=f"{name} turns positions for one size")
        return ImageTower(
            step=step,
            grid=_pair(grid),
            holder=trunk,
            name="pos_embed",
            prefix=positions.shape[1] - grid[0] * grid[1],
            patches=patches,
        )
    config = getattr(trunk, "pretrained_cfg", None) or {}
    if config.get("fixed_input_size") or isinstance(positions, Tensor):
        return ImageTower(step=_pair(visual.image_size), why_fixed=f"{name} takes one image size")
    info = getattr(trunk, "feature_info", None)
    stride = int(info[-1]["reduction"]) if isinstance(info, list) and info else _USUAL_STRIDE
    return ImageTower(step=(stride, stride))


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    down, across = size
    return int(down), int(across)


def tokens_at(model: nn.Module, size: tuple[int, int]) -> int | None:
    """Patches of an image of (height, width) and the tokens beside them; None: the tower has no positions."""
    tower = image_tower(model)
    if tower.grid is None:
        return None
    down, across = tower.grid_at(size)
    visual: Any = model.visual
    extra = tower.prefix
    if isinstance(visual, TimmModel):
        extra = max(extra, int(getattr(visual.trunk, "num_prefix_tokens", 0)))
    return down * across + extra
