"""Which image size a model is used at: rounded to its patches, checked, or chosen among proven ones.

Enters: what someone asked for: pixels, "HEIGHTxWIDTH", or "fast", "balanced" or "best". Leaves: a size that
the image tower takes. Called by the trainer's plan and by the engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from cliptune.errors import InvalidInputError
from cliptune_model.proven_sizes import WORDS, ProvenSize, Size, chosen_size, told
from cliptune_model.towers.image_tower import image_tower

if TYPE_CHECKING:
    from cliptune_model.clip import Clip

LARGEST_SIDE: Final = 4096
_PIXELS: Final = re.compile(r"\d{1,5}(x\d{1,5})?")


def fitted(clip: Clip, size: Size, *, exact: bool = False, path: str = "resolution") -> Size:
    """The nearest size whose sides are multiples of the patch; `size` itself if its are.

    Args:
        clip: the model.
        size: (height, width) in pixels.
        exact: refuse to round.
        path: of the field that asks, for errors.

    Raises:
        InvalidInputError: smaller than a patch, beyond `LARGEST_SIDE`, no multiple and `exact`, or a tower
            that takes one size alone.
    """
    tower = image_tower(clip.model)
    if tower.why_fixed:
        if size == clip.image_size:
            return size
        raise _wrong(path, size, f"{told(clip.image_size)}: {tower.why_fixed}")
    (height, width), (down, across) = size, tower.step
    if height < down or width < across:
        raise _wrong(path, size, f"at least {told((down, across))}: one patch of {clip.architecture}")
    if max(size) > LARGEST_SIDE:
        raise _wrong(path, size, f"sides of at most {LARGEST_SIDE}")
    rounded = _nearest(height, down), _nearest(width, across)
    if exact and rounded != size:
        below, above = height // down * down, -(-height // down) * down
        raise _wrong(
            path, size, f"multiples of the patch, {told((down, across))}, such as {below} or {above}"
        )
    return rounded


def asked_size(clip: Clip, wanted: str, proven: Sequence[ProvenSize], usual: Size) -> Size:
    """What a request means by `wanted`; "": `usual`. Pixels are rounded to the patch.

    Raises:
        InvalidInputError: neither pixels nor one of the words, or a size that the model cannot take.
    """
    if not wanted:
        return usual
    if wanted in WORDS:
        return chosen_size(wanted, proven, usual)
    if not _PIXELS.fullmatch(wanted):
        raise InvalidInputError(
            f"resolution is {wanted!r}; allowed: pixels as 224 or 224x320, or {', '.join(WORDS)}",
            path="resolution",
            allowed=", ".join(WORDS),
        )
    height, _, width = wanted.partition("x")
    return fitted(clip, (int(height), int(width or height)))


def _nearest(side: int, step: int) -> int:
    return max(step, int(side / step + 0.5) * step)


def _wrong(path: str, size: Size, allowed: str) -> InvalidInputError:
    return InvalidInputError(f"{path} is {told(size)}; allowed: {allowed}", path=path, allowed=allowed)
