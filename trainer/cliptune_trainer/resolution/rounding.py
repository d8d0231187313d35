"""A side in pixels as the user gave it, fitted to the model.

Enters: a side and the field that it comes from. Leaves: a size that the model takes, with a remark where it
is another. Called where sizes are settled, and by `cliptune eval`.
"""

from __future__ import annotations

from cliptune_model.clip import Clip
from cliptune_model.image_sizes import fitted
from cliptune_model.proven_sizes import Size, told
from cliptune_model.towers.image_tower import image_tower
from cliptune_trainer.remark import Remark


def fit_side(clip: Clip, side: int, path: str, remarks: list[Remark], *, exact: bool = False) -> Size:
    """The size of square images; rounded to the patch, which is added to `remarks`.

    Raises:
        InvalidInputError: no size that the model can take, or `exact` forbids to round.
    """
    size = fitted(clip, (side, side), exact=exact, path=path)
    if size != (side, side):
        down, _ = image_tower(clip.model).step
        message = f"{path} is {side}: images are {told(size)} pixels, a multiple of the patch ({down})"
        remarks.append(Remark(code="resolution-rounded", message=message))
    return size
