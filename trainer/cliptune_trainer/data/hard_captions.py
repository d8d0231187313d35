"""Captions that are nearly right: a true one with its words changed so that it says something else.

Enters: the captions of a split. Leaves: for a row and epoch a wrong caption, and the id of the true caption
that it may happen to be. Called by the loader for losses that learn from them, and once by `decide`.

Yuksekgonul et al. 2023 (NegCLIP), section 4, swap words of one kind, told apart by a tagger. Without one, two
things are changed here: a word for its opposite (left and right, with and without, malignant and benign), or
two content words for each other. What is drawn is a pure function of (seed, epoch, row).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, Self

import numpy as np

from cliptune_trainer.data.dataset import Pairs

HARD_CAPTION_NEEDS: Final = "captions with at least two different content words, or one that has an opposite"

_PAIRS: Final = (
    "left right",
    "upper lower",
    "top bottom",
    "above below",
    "over under",
    "inside outside",
    "front back",
    "anterior posterior",
    "superior inferior",
    "medial lateral",
    "proximal distal",
    "with without",
    "normal abnormal",
    "healthy diseased",
    "benign malignant",
    "positive negative",
    "present absent",
    "acute chronic",
    "mild severe",
    "increased decreased",
    "increase decrease",
    "high low",
    "higher lower",
    "large small",
    "larger smaller",
    "big little",
    "long short",
    "thick thin",
    "wide narrow",
    "many few",
    "more less",
    "single multiple",
    "dense sparse",
    "bright dark",
    "light dark",
    "black white",
    "hot cold",
    "wet dry",
    "open closed",
    "old new",
    "young old",
    "intact broken",
    "intact cracked",
    "functional defective",
    "undamaged damaged",
    "smooth rough",
    "straight curved",
    "horizontal vertical",
    "round angular",
    "man woman",
    "boy girl",
    "male female",
    "standing sitting",
    "empty full",
)
# Words that say nothing of the image by themselves: swapping them makes nonsense, not a wrong claim.
_IDLE: Final = frozenset(
    word
    for line in (
        "a an the of in on at to by for from with without and or but nor as is are was were be been being am",
        "do does did has have had it its this that these those there here which who whom whose what where",
        "when while than then into onto over under up down out off near next no not very",
        "beside between behind through against within along among around across after before during",
        "each other some any all both",
        "photo image picture photograph showing shows shown seen view",
    )
    for word in line.split()
)
_WORD: Final = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
# Among all draws of one seed, epoch and row: that of the wrong caption.
_STREAM: Final = 5


class HardCaptions:
    """Wrong captions for the rows of a split.

    Args:
        ids: of each true caption.
        seed: of what is drawn.
    """

    def __init__(self, ids: Mapping[str, int], seed: int) -> None:
        self._ids, self._seed = dict(ids), seed

    @classmethod
    def of(cls, pairs: Pairs, seed: int) -> Self:
        """Those of a split."""
        return cls(
            {pair.caption: int(number) for pair, number in zip(pairs.pairs, pairs.caption_ids, strict=True)},
            seed,
        )

    def possible(self, caption: str) -> bool:
        """Whether the caption can be made wrong."""
        words = list(_WORD.finditer(caption))
        return bool(_opposed(words)) or len(_content(words)) > 1

    def draw(self, caption: str, epoch: int, row: int) -> str | None:
        """A wrong form of a row's caption; None where it cannot be made wrong."""
        words = list(_WORD.finditer(caption))
        opposed, content = _opposed(words), _content(words)
        if not opposed and len(content) < 2:
            return None
        random = np.random.default_rng([self._seed, epoch, row, _STREAM])
        if opposed and (len(content) < 2 or random.random() < 0.5):
            return _replaced(caption, [opposed[int(random.integers(len(opposed)))]])
        first, second = sorted(random.choice(len(content), size=2, replace=False).tolist())
        one, other = content[first], content[second]
        return _replaced(caption, [(one, other.group()), (other, one.group())])

    def id_of(self, caption: str) -> int:
        """Its number among the true captions; -1: no row has it."""
        return self._ids.get(caption, -1)


@lru_cache(maxsize=1)
def _opposites() -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for one, other in (pair.split() for pair in _PAIRS):
        found[one] = (*found.get(one, ()), other)
        found[other] = (*found.get(other, ()), one)
    return found


def _opposed(words: Sequence[re.Match[str]]) -> list[tuple[re.Match[str], str]]:
    """Words that have an opposite, each with it."""
    known = _opposites()
    return [(word, other) for word in words for other in known.get(word.group().lower(), ())]


def _content(words: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """The first of each word that says something of the image, in their order."""
    first: dict[str, re.Match[str]] = {}
    for word in words:
        if word.group().lower() not in _IDLE:
            first.setdefault(word.group().lower(), word)
    return list(first.values())


def _replaced(caption: str, changes: Sequence[tuple[re.Match[str], str]]) -> str:
    """The caption with some of its words, in their order, replaced."""
    parts, at = [], 0
    for word, other in changes:
        parts += [caption[at : word.start()], _in_case_of(word.group(), other)]
        at = word.end()
    return "".join([*parts, caption[at:]])


def _in_case_of(word: str, other: str) -> str:
    """A word with a capital where the one that it replaces has its first alone; abbreviations stay."""
    if other.isupper() and len(other) > 1:
        return other
    return other.capitalize() if word.istitle() else other.lower()
