"""Similarities that look at lengths too: the inner product, and distances in flat space.

Features of a tower are about √D long when it is new, so all are multiplied by 1/√D first, unless the spec
gives another `scale`: scores are then of the cosine's order, and a logit scale that suits the cosine suits
them.

Shape suffixes: N, M rows, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from cliptune_model.similarity.base import Bounds, Similarity, widened

_SCALE = {"scale": Bounds(1e-6, 1e6, "what features are multiplied by; 1/√D if not given")}


class Dot(Similarity):
    """The inner product of the scaled features: sure embeddings may be long, doubtful ones short.

    A client's vectors are the scaled features, so that their own inner product is the similarity.
    """

    name = "dot"
    half_products = True
    accepts: ClassVar[Mapping[str, Bounds]] = _SCALE

    def __init__(self, dim: int, parameters: Mapping[str, float] | None = None) -> None:
        super().__init__(dim, parameters)
        self.scale = float(self.parameters_given.get("scale", 1.0 / math.sqrt(max(dim, 1))))

    def prepare_images(self, image_ND: Tensor) -> Tensor:
        """Scaled features, P = D."""
        return self.image_vectors(image_ND)

    def prepare_texts(self, text_MD: Tensor) -> Tensor:
        """Scaled features, P = D."""
        return self.text_vectors(text_MD)

    def image_vectors(self, image_ND: Tensor) -> Tensor:
        """Scaled features."""
        return self.scale * widened(image_ND)

    def text_vectors(self, text_ND: Tensor) -> Tensor:
        """Scaled features."""
        return self.scale * widened(text_ND)

    def values(self) -> dict[str, float]:
        """The scale."""
        return {"scale": self.scale}


class SquaredEuclidean(Dot):
    """-|a - b|² of the scaled features a, b: at most 0.

    As in prototypical networks (Snell et al. 2017, Eq. 1 and 2), whose classes are means too. One product of
    P = D + 2: [√2 a, -|a|², 1] . [√2 b, 1, -|b|²]. A client's vectors are the scaled features.
    """

    name = "squared_euclidean"
    half_products = False  # squares of lengths nearly cancel

    def prepare_images(self, image_ND: Tensor) -> Tensor:
        """[√2 a, -|a|², 1]."""
        a_ND = self.image_vectors(image_ND)
        square_N1 = a_ND.square().sum(dim=-1, keepdim=True)
        return torch.cat([math.sqrt(2.0) * a_ND, -square_N1, torch.ones_like(square_N1)], dim=-1)

    def prepare_texts(self, text_MD: Tensor) -> Tensor:
        """[√2 b, 1, -|b|²]."""
        b_MD = self.text_vectors(text_MD)
        square_M1 = b_MD.square().sum(dim=-1, keepdim=True)
        return torch.cat([math.sqrt(2.0) * b_MD, torch.ones_like(square_M1), -square_M1], dim=-1)


class Mahalanobis(SquaredEuclidean):
    """-(a - b)ᵀ W Wᵀ (a - b) with a learned W [D, D], from the identity: which directions matter is learned.

    Weinberger and Saul 2009 (LMNN), section 2, with M = W Wᵀ, which so stays positive. A client's vectors
    are the scaled features times W: their squared Euclidean distance is the similarity's negative.
    """

    name = "mahalanobis"

    def __init__(self, dim: int, parameters: Mapping[str, float] | None = None) -> None:
        super().__init__(dim, parameters)
        self.weight = nn.Parameter(torch.eye(dim))

    def image_vectors(self, image_ND: Tensor) -> Tensor:
        """Scaled features times W."""
        return super().image_vectors(image_ND) @ self.weight

    def text_vectors(self, text_ND: Tensor) -> Tensor:
        """Scaled features times W."""
        return super().text_vectors(text_ND) @ self.weight
