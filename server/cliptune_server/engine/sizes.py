"""The image sizes that a loaded model serves: what a request asks for, and what reads its images.

Enters: a request's `resolution`. Leaves: an `AskedSize`. Made by `models.py` for each model, asked by
`inference.py`. The towers take any size; items of one size make batches of their own, for the batcher sorts
them by shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cliptune.errors import InvalidInputError
from cliptune_model.clip import Clip
from cliptune_model.gpu_jpeg import GpuJpeg
from cliptune_model.image_reader import ImageReader
from cliptune_model.image_sizes import asked_size
from cliptune_model.proven_sizes import ProvenSize, Size, told

# A caller's sides reach so far beyond the largest side that the model was trained or measured at: attention
# costs the fourth power of it.
_BEYOND: Final = 2
_MOST_READERS: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedSize:
    """What a request's images become.

    Attributes:
        reader: brings images to the size.
        mark: added to what images are remembered by; empty at the serving size.
        positions: of an image, against one at the serving size: what the batcher counts it as.
    """

    reader: ImageReader
    mark: bytes = b""
    positions: int = 1


class ImageSizes:
    """Of one model. Used on the event loop."""

    def __init__(
        self, clip: Clip, *, serving: Size, proven: Sequence[ProvenSize], decode: str = "exact"
    ) -> None:
        """`serving`: where a request asks for none. `decode`: as a `ServingWay` says it."""
        self._clip: Final = clip
        self._proven: Final = tuple(proven)
        self._decode: Final = decode
        self.serving: Final = serving
        self._most: Final = _BEYOND * max(
            *serving, *clip.image_size, *(side for one in self._proven for side in one.size)
        )
        self.usual: Final = AskedSize(reader=self._reader(serving))
        self._others: OrderedDict[Size, AskedSize] = OrderedDict()

    def asked(self, resolution: str) -> AskedSize:
        """What a request means by it.

        Raises:
            InvalidInputError: no such size, or one far beyond those that the model was trained or measured
                at.
        """
        size = asked_size(self._clip, resolution, self._proven, self.serving)
        if size == self.serving:
            return self.usual
        if max(size) > self._most:
            raise InvalidInputError(
                f"resolution is {told(size)}; allowed: sides of at most {self._most},"
                f" {_BEYOND} times those that the model was made for",
                path="resolution",
                allowed=f"up to {self._most}",
            )
        found = self._others.get(size)
        if found is None:
            area, usual = size[0] * size[1], self.serving[0] * self.serving[1]
            found = AskedSize(
                reader=self._reader(size),
                mark=f"@{size[0]}x{size[1]}".encode(),
                positions=max(1, round(area / usual)),
            )
            self._others[size] = found
            if len(self._others) > _MOST_READERS:
                self._others.popitem(last=False)
        return found

    def _reader(self, size: Size) -> ImageReader:
        clip = self._clip.at(size)
        on_gpu = self._decode == "gpu" and not GpuJpeg.why_not(clip)
        return ImageReader(
            clip, fast=self._decode != "exact", gpu=GpuJpeg(clip, self._clip.device) if on_gpu else None
        )
