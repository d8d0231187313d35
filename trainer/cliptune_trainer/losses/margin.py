"""A ranking loss: a row's own partner shall be more alike than any other by a margin."""

from __future__ import annotations

from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast, both_ways


def margin(contrast: Contrast, *, margin: float = 0.2, hardest: float = 0.0) -> Tensor:
    """Mean over rows of their hinges, in both directions; scalar. Similarities are not scaled.

    Faghri et al. 2018 (VSE++), Eq. 5 (all negatives of a row, summed) or Eq. 6 (the hardest alone). Rows that
    share image or caption are no negatives of each other.

    Args:
        contrast: the batch.
        margin: by how much, in units of the similarity; above 0.
        hardest: other than 0, the hardest negative alone.
    """
    negative_NN = ~contrast.identities.same()

    def of_rows(similarity_NN: Tensor) -> Tensor:
        hinges_NN = (margin + similarity_NN - similarity_NN.diagonal()[:, None]).clamp(min=0.0)
        hinges_NN = hinges_NN * negative_NN
        return hinges_NN.amax(dim=1) if hardest else hinges_NN.sum(dim=1)

    return both_ways(of_rows, contrast.similarities())
