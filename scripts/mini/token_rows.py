"""Lists of tokens of different lengths, held end to end: the form in which texts are stored and padded.

Called by `corpus.py` (the file) and `teacher.py` (batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """N lists. `flat`: uint16, all of them; `lengths`: [N] of at most 255."""

    flat: npt.NDArray[np.uint16]
    lengths: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> TokenRows:
        """From plain lists."""
        return cls(
            flat=np.array([token for row in rows for token in row], dtype=np.uint16),
            lengths=np.array([len(row) for row in rows], dtype=np.uint8),
        )

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """[N]: where each list begins."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def padded(self, chosen: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
        """[len(chosen), width]: these lists, 0 after each one's end."""
        places = self.starts[chosen][:, None] + np.arange(width)
        inside = np.arange(width) < self.lengths[chosen][:, None].astype(np.int64)
        return np.where(inside, self.flat[np.minimum(places, len(self.flat) - 1)], 0).astype(np.int64)
