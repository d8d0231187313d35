"""How alike embeddings are.

Enters: embeddings as the towers leave them. Leaves: scores. Called by the engine and by evaluation.

Shape suffixes: N, M rows, D embedding.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def normalise(embeddings_ND: Tensor) -> Tensor:
    """Unit length in fp32, whatever comes in: half precision is too coarse, and float64 is absent on MPS."""
    return F.normalize(embeddings_ND.float(), dim=-1)


class Cosine:
    """CLIP's own similarity: the cosine of the angle, in [-1, 1] up to rounding."""

    name = "cosine"

    def __call__(self, a_ND: Tensor, b_MD: Tensor) -> Tensor:
        """Every row against every row: [N, D], [M, D] → [N, M] fp32."""
        return normalise(a_ND) @ normalise(b_MD).T

    def pairs(self, a_ND: Tensor, b_ND: Tensor) -> Tensor:
        """Row i against row i: [N, D], [N, D] → [N] fp32."""
        return (normalise(a_ND) * normalise(b_ND)).sum(dim=-1)
