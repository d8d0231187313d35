"""What follows from features on the host: scores, class features, and the vectors that clients are given.

Enters: features of the towers as numpy, one row an item; a failed item's row is NaN. Leaves: numpy. Called by
`inference.py`, in threads. The model's own similarity decides, on a copy that stays on the CPU: rows are few
there, and the device belongs to the towers.

Shape suffixes: N images or pairs, M texts, K prompts, D embedding.
"""

from __future__ import annotations

import copy
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from cliptune_model.similarity import Similarity

Vector = npt.NDArray[np.float32]


class Scores:
    """The similarity of one loaded model."""

    def __init__(self, similarity: Similarity) -> None:
        self.similarity: Final = copy.deepcopy(similarity).cpu().eval().requires_grad_(False)
        kind = type(similarity)
        plain = (Similarity.image_vectors, Similarity.text_vectors)
        self.given_as_kept: Final = similarity.unit and (kind.image_vectors, kind.text_vectors) == plain
        """Features are unit vectors and are what a client is given: nothing is left to do."""

    def table(self, image_ND: Vector, text_MD: Vector) -> Vector:
        """Every image against every text, [N, M]."""
        return _numpy(self.similarity(torch.from_numpy(image_ND), torch.from_numpy(text_MD)))

    def pairs(self, image_ND: Vector, text_ND: Vector) -> Vector:
        """Image i against text i, [N]."""
        return _numpy(self.similarity.pairs(torch.from_numpy(image_ND), torch.from_numpy(text_ND)))

    def ensemble(self, prompt_KD: Vector) -> Vector:
        """The text features of a class, from its prompts', [D]."""
        return _numpy(self.similarity.ensemble(torch.from_numpy(prompt_KD)))

    def image_vectors(self, image_ND: Vector) -> Vector:
        """What a client is given, [N, D]."""
        return _numpy(self.similarity.image_vectors(torch.from_numpy(image_ND)))

    def text_vectors(self, text_ND: Vector) -> Vector:
        """What a client is given, [N, D]."""
        return _numpy(self.similarity.text_vectors(torch.from_numpy(text_ND)))


def _numpy(tensor: torch.Tensor) -> Vector:
    found: Vector = tensor.numpy()
    return found
