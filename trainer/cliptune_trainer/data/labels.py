"""The labels of a split's rows, as losses take them.

Enters: pairs. Leaves: for some of them, which labels each bears. Called by the loader for losses that go by
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from cliptune_trainer.data.dataset import Pairs


class Labels:
    """Places of labels by row; a batch is made dense when it is asked for.

    Args:
        names: the distinct labels, sorted.
        places: of each row's labels among them.
    """

    def __init__(self, names: Sequence[str], places: Sequence[Sequence[int]]) -> None:
        self.names = tuple(names)
        self._places = tuple(tuple(row) for row in places)

    @classmethod
    def of(cls, pairs: Pairs) -> Self:
        """Those of a split."""
        names = sorted({label for pair in pairs.pairs for label in pair.labels})
        place = {name: number for number, name in enumerate(names)}
        return cls(names, [[place[label] for label in pair.labels] for pair in pairs.pairs])

    def multi_hot(self, rows: Sequence[int]) -> Tensor:
        """[B, C] float32: 1 where a row bears a label."""
        labels_BC = torch.zeros(len(rows), len(self.names))
        for at, row in enumerate(rows):
            labels_BC[at, list(self._places[row])] = 1.0
        return labels_BC
