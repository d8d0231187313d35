"""InfoNCE without the positive in its denominator: less in need of large batches."""

from __future__ import annotations

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast, both_ways, log_sum_over


def decoupled(contrast: Contrast) -> Tensor:
    """Decoupled contrastive loss in both directions; scalar, below 0 for rows that are told apart well.

    Yeh et al. 2022 (DCL), Eq. 6. Rows that share image or caption are no negatives of each other; a row
    without any negative adds nothing.
    """
    negative_NN = ~contrast.identities.same()
    some_N = negative_NN.any(dim=1)

    def of_rows(logits_NN: Tensor) -> Tensor:
        positive_N = logits_NN.diagonal()
        return torch.where(some_N, log_sum_over(logits_NN, negative_NN), positive_N) - positive_N

    return both_ways(of_rows, contrast.logits())
