"""Class vectors that are remembered: a classifier is asked with the same classes again and again.

Enters: the prompts of a class. Leaves: its vector, if it was computed before. One cache for each model; the
least recently used class is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_MAX_CLASSES: Final = 4096
# A class of 80 long prompts holds 40 KB of text; together the keys stay below this.
_MAX_CHARS: Final = 16 * 1024 * 1024

Vector = npt.NDArray[np.float32]


class VectorCache:
    """Prompts of a class → its [D] text features."""

    def __init__(self, max_classes: int = _MAX_CLASSES, max_chars: int = _MAX_CHARS) -> None:
        self._max_classes: Final = max_classes
        self._max_chars: Final = max_chars
        self._vectors: OrderedDict[tuple[str, ...], Vector] = OrderedDict()
        self._chars = 0

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, prompts: Sequence[str]) -> Vector | None:
        """The vector, or None when it is not remembered."""
        key = tuple(prompts)
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, prompts: Sequence[str], vector_D: Vector) -> None:
        """Remembers a class, and forgets others to make room."""
        key = tuple(prompts)
        if key in self._vectors:
            return
        self._vectors[key] = vector_D
        self._chars += _chars(key)
        while self._vectors and (len(self._vectors) > self._max_classes or self._chars > self._max_chars):
            oldest, _ = self._vectors.popitem(last=False)
            self._chars -= _chars(oldest)


def _chars(key: tuple[str, ...]) -> int:
    return sum(map(len, key))
