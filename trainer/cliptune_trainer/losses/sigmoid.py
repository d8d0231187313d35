"""The sigmoid loss over a batch of pairs: every image with every text is a yes or a no of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune_model.similarity import widened
from cliptune_trainer.losses.contrast import Contrast


def sigmoid(contrast: Contrast) -> Tensor:
    """Sum over all N x N pairs of their negative log-likelihood, divided by N.

    Zhai et al. 2023 (SigLIP), Eq. 1 and Algorithm 1. Equal captions in other rows count as negatives.

    Raises:
        ValueError: the model has no bias. Without it the N - 1 negatives of each row drown its positive.
    """
    logits_NN = contrast.logits() + bias_of(contrast.logit_bias)
    signs_NN = 2.0 * torch.eye(len(contrast), device=logits_NN.device, dtype=logits_NN.dtype) - 1.0
    return -F.logsigmoid(signs_NN * logits_NN).sum() / len(contrast)


def bias_of(logit_bias: Tensor | None) -> Tensor:
    """The bias as it enters the logits. Raises ValueError when the model has none."""
    if logit_bias is None:
        raise ValueError("the sigmoid loss needs a model with a logit bias")
    return widened(logit_bias)
