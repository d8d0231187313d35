"""InfoNCE that minds the hardest negatives of each row most."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast, both_ways, log_sum_over


def hard_negative(contrast: Contrast, *, alpha: float = 1.0, beta: float = 0.25) -> Tensor:
    """HN-NCE in both directions; scalar.

    Radenovic et al. 2023 (DiHT), Eq. 4 and 5: in InfoNCE's denominator the positive counts `alpha` times and
    negative j of n counts n * softmax_j(beta * logits) times. With 1 and 0 it equals InfoNCE. Here rows that
    share image or caption with row i are none of its negatives: they would be the hardest.

    Args:
        contrast: the batch.
        alpha: weight of the positive in the denominator, 0 to 1. 0: as in `decoupled`.
        beta: how much harder negatives count for more, 0 or more.
    """
    negative_NN = ~contrast.identities.same()
    count_N = negative_NN.sum(dim=1)
    some_N = count_N > 0

    def of_rows(logits_NN: Tensor) -> Tensor:
        positive_N = logits_NN.diagonal()
        # log of the sum of n * softmax(beta * x) * exp(x)
        weighted_N = (
            log_sum_over((1.0 + beta) * logits_NN, negative_NN)
            - log_sum_over(beta * logits_NN, negative_NN)
            + count_N.to(logits_NN.dtype).log()
        )
        # A row without negatives has nothing to learn from.
        weighted_N = torch.where(some_N, weighted_N, positive_N)
        if alpha:
            both_N = torch.logaddexp(positive_N + math.log(alpha), weighted_N)
            return torch.where(some_N, both_N - positive_N, 0.0)
        return weighted_N - positive_N

    return both_ways(of_rows, contrast.logits())
