"""Similarities that look at directions alone: the cosine of an angle, and the angle itself.

Shape suffixes: N rows, D embedding.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from cliptune_model.similarity.base import Similarity, normalise

# Products within so much of ±1 are where the arc cosine is as steep as fp32 can bear.
_EDGE: Final = 1e-6


class Cosine(Similarity):
    """CLIP's own similarity: the cosine of the angle, in [-1, 1] up to rounding.

    Radford et al. 2021, Figure 3.
    """

    name = "cosine"
    unit = True
    half_products = True

    def prepare_images(self, image_ND: Tensor) -> Tensor:
        """Unit vectors, P = D."""
        return normalise(image_ND)

    def prepare_texts(self, text_MD: Tensor) -> Tensor:
        """Unit vectors, P = D."""
        return normalise(text_MD)


class Angular(Cosine):
    """1 - θ / π of the angle θ, in [0, 1]: a metric's complement, and not flat where vectors nearly agree.

    Cer et al. 2018 (Universal Sentence Encoder), Eq. 1. The slope of the arc cosine has no bound at ±1;
    within 1e-6 of them it goes on along its tangent, so that equal vectors come to 0.9998 and every
    gradient is finite.
    """

    name = "angular"
    linear = False

    def of_products(self, products: Tensor) -> Tensor:
        """1 - arccos(p) / π."""
        inside = products.clamp(_EDGE - 1.0, 1.0 - _EDGE)
        # With clamp's own gradient each term has a slope where the other has none.
        beyond = (products - inside) / math.sqrt(_EDGE * (2.0 - _EDGE))
        return 1.0 - (torch.acos(inside) - beyond) / math.pi
