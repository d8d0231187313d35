"""Retrieval: whether an image finds its captions, and a caption its images.

Enters: scores, a block of queries at a time, and which candidates are right. Leaves: metrics of any
weighting. Called by `measure`.

B: weightings, Q: queries, K: candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cliptune.metric_names import RECALLS, map_name, recall_name
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.evaluation.metrics import (
    Booleans,
    Floats,
    Integers,
    average_precision,
    positive_ranks,
    share,
)

# Rows of the table of scores held at once.
_QUERIES: Final = 1024

Scores = Callable[[Integers], Floats]
"""Queries [q] → their scores against all candidates [q, K]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Retrieval:
    """How queries of one direction fared. `best_Q` is the rank of each one's first right candidate."""

    direction: str
    queries_Q: Integers
    best_Q: Integers
    average_precision_Q: Floats

    def metrics(self, weights_BQ: Floats) -> Mapping[str, Floats]:
        """Values [B] by name.

        Recall@k: the share of queries with a right candidate among the first k, as CLIP's papers have it.
        """
        values = {recall_name(self.direction, k): share(self.best_Q <= k, weights_BQ) for k in RECALLS}
        values[map_name(self.direction)] = share(self.average_precision_Q, weights_BQ)
        return values


class Positives:
    """Which images and captions belong together: an image's positives are all its captions, a caption's all
    images that bear it."""

    def __init__(self, pairs: Pairs, readable_I: Booleans) -> None:
        self.by_image: dict[int, set[int]] = {}
        self.by_caption: dict[int, set[int]] = {}
        kept = readable_I[pairs.image_ids]
        for image, caption in zip(
            pairs.image_ids[kept].tolist(), pairs.caption_ids[kept].tolist(), strict=True
        ):
            self.by_image.setdefault(image, set()).add(caption)
            self.by_caption.setdefault(caption, set()).add(image)


def retrieve(
    direction: str, scores: Scores, positives: Mapping[int, set[int]], check: Callable[[], None]
) -> Retrieval:
    """Asks every query.

    Args:
        direction: of `cliptune.metric_names.DIRECTIONS`.
        scores: of a block of queries against all candidates; -inf for one that is none.
        positives: the right candidates of each query.
        check: called between blocks; may raise.
    """
    queries = np.array(sorted(positives), dtype=np.int64)
    best: list[int] = []
    averages: list[float] = []
    for start in range(0, len(queries), _QUERIES):
        check()
        part: Sequence[int] = queries[start : start + _QUERIES].tolist()
        for query, scores_K in zip(part, scores(queries[start : start + _QUERIES]), strict=True):
            ranks_P = positive_ranks(scores_K, np.array(sorted(positives[query]), dtype=np.int64))
            best.append(int(ranks_P[0]))
            averages.append(average_precision(ranks_P))
    return Retrieval(
        direction=direction,
        queries_Q=queries,
        best_Q=np.array(best, dtype=np.int64),
        average_precision_Q=np.array(averages, dtype=np.float64),
    )
