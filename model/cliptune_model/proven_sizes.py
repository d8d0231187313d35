"""Image sizes that a model was measured at, and which of them serves a wish best.

Enters: what a sweep over sizes found. Leaves: plain JSON in the manifest, and one of the sizes. Called by the
manifest, by `image_sizes`, and by the trainer's sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

Size: TypeAlias = tuple[int, int]  # height, width in pixels

WORDS: Final = ("fast", "balanced", "best")
# Of the best size's metric, that "balanced" is content with.
_BALANCED_SHARE: Final = 0.98


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


def told(size: Size) -> str:
    """For a person: "224", or "224x320"."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
