"""What teaches a text tower, as numbers: CLIP's tokens for the pupil, word pieces for the teacher.

Enters: texts. Leaves: `corpus.npz`, made on a CPU by `prepare` (finding tokens is what takes long, and
keeps a GPU waiting); read by `texts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import open_clip

from scripts.mini import towers
from scripts.mini.teacher import tokenise
from scripts.mini.token_rows import TokenRows

_PIECE: Final = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The same sentences twice."""

    pupil: TokenRows
    teacher: TokenRows

    def __len__(self) -> int:
        return len(self.pupil)

    def write(self, path: Path) -> None:
        """Compressed."""
        np.savez_compressed(
            path,
            pupil=self.pupil.flat,
            pupil_lengths=self.pupil.lengths,
            teacher=self.teacher.flat,
            teacher_lengths=self.teacher.lengths,
        )

    @classmethod
    def read(cls, path: Path) -> Corpus:
        """Inverse of `write`."""
        with np.load(path) as held:
            return cls(
                pupil=TokenRows(flat=held["pupil"], lengths=held["pupil_lengths"]),
                teacher=TokenRows(flat=held["teacher"], lengths=held["teacher_lengths"]),
            )


def make(texts: Sequence[str], teacher_folder: Path, workers: int = 2) -> Corpus:
    """In the order of the texts."""
    pieces = [texts[begin : begin + _PIECE] for begin in range(0, len(texts), _PIECE)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = [row for found in pool.map(pupil_rows, pieces) for row in found]
    return Corpus(pupil=TokenRows.of(rows), teacher=tokenise(teacher_folder, texts))


def pupil_rows(texts: Sequence[str]) -> list[list[int]]:
    """CLIP's tokens, with those of start and end, cut as open_clip cuts them."""
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    return [[start, *tokenizer.encode(text)[: towers.CONTEXT - 2], end] for text in texts]
