"""Which image size a model is used at: rounded to its patches, checked, or chosen among proven ones.

Enters: what someone asked for: pixels, "HEIGHTxWIDTH", or "fast", "balanced" or "best". Leaves: a size that
the image tower takes. Called by the trainer's plan and by the engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from cliptune.errors import InvalidInputError
from cliptune_model.towers.image_tower import image_tower

if TYPE_CHECKING:
    from cliptune_model.clip import Clip

Size: TypeAlias = tuple[int, int]  # height, width in pixels

LARGEST_SIDE: Final = 4096
WORDS: Final = ("fast", "balanced", "best")
# Of the best size's metric, that "balanced" is content with.
_BALANCED_SHARE: Final = 0.98
_PIXELS: Final = re.compile(r"\d{1,5}(x\d{1,5})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvenSize:
    """A size that a model was measured at. Plain JSON in the manifest.

    Attributes:
        height, width: in pixels.
        value: of the main metric; more is better.
        images_per_second: through the image tower, in batches.
        latency_ms: one image through the image tower.
        memory_bytes: weights and the tensors of a batch at their peak.
    """

    height: int
    width: int
    value: float
    images_per_second: float
    latency_ms: float
    memory_bytes: int

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.height, self.width


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


def chosen_size(word: str, proven: Sequence[ProvenSize], usual: Size) -> Size:
    """Of the proven sizes: "best" has the highest metric; "fast" is the quickest; "balanced" the quickest
    whose metric is within 2 % of the best. `usual` where nothing was measured."""
    if not proven:
        return usual
    best = max(proven, key=lambda one: (one.value, one.images_per_second))
    if word == "best":
        return best.size
    enough = [one for one in proven if word == "fast" or one.value >= _BALANCED_SHARE * best.value]
    return max(enough or [best], key=lambda one: one.images_per_second).size


def best_within(proven: Sequence[ProvenSize], budget_ms: float) -> ProvenSize | None:
    """The size with the highest metric whose latency keeps to the budget (0: any); None: there is none."""
    possible = [one for one in proven if not budget_ms or one.latency_ms <= budget_ms]
    return max(possible, key=lambda one: (one.value, -one.latency_ms), default=None)


def told(size: Size) -> str:
    """For a person: "224", or "224x320"."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _nearest(side: int, step: int) -> int:
    return max(step, int(side / step + 0.5) * step)


def _wrong(path: str, size: Size, allowed: str) -> InvalidInputError:
    return InvalidInputError(f"{path} is {told(size)}; allowed: {allowed}", path=path, allowed=allowed)
