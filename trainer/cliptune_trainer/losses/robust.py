"""InfoNCE's robust form, in which a learned temperature cannot merely sharpen the softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cliptune_model.similarity import widened
from cliptune_trainer.losses.contrast import Contrast, both_ways, log_sum_over

EPSILON = 1e-14


def robust(contrast: Contrast, *, concentration: float = 0.3) -> Tensor:
    """Robust global contrastive loss over the batch; scalar, below 0 for rows that are told apart well.

    Wei et al. 2024 (FastCLIP), Eq. 3 (RGCL-g), halved: with temperature τ = 1 / scale and h the similarities
    less that of the row's own pair, τ log(ε + mean over negatives of exp(h / τ)) of images and of texts,
    averaged, plus ρτ. For τ this is the dual of the worst mean of h over all weightings of the negatives
    whose divergence from the even one is at most ρ: at its best, softmax(h / τ) has just that divergence. The
    mean is the batch's; ρ is a share of the most that it can be, log of the number of negatives, so that it
    fits any batch.

    Rows that share image or caption are no negatives of each other; a row without any adds nothing but ρτ.

    Args:
        contrast: the batch.
        concentration: ρ as that share, within (0, 1). Higher: a lower temperature, on fewer, harder
            negatives.
    """
    negative_NN = ~contrast.identities.same()
    count_N = negative_NN.sum(dim=1)
    some_N = count_N > 0
    temperature = 1.0 / widened(contrast.logit_scale)

    def of_rows(logits_NN: Tensor) -> Tensor:
        mean_N = log_sum_over(logits_NN, negative_NN) - count_N.to(logits_NN.dtype).log()
        mean_N = mean_N - logits_NN.diagonal()
        mean_N = torch.where(some_N, mean_N, 0.0)
        return torch.logaddexp(mean_N, torch.full_like(mean_N, math.log(EPSILON)))

    radius = concentration * count_N.clamp(min=1).to(temperature.dtype).log().mean()
    return temperature * (both_ways(of_rows, contrast.logits()) + radius)
