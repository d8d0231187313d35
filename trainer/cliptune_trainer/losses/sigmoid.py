"""The sigmoid loss over a batch of pairs: every image with every text is a yes or a no of its own.

N: pairs in the batch, D: embedding dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.infonce import widened


def sigmoid(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    identities: Identities,
) -> Tensor:
    """Sum over all N x N pairs of their negative log-likelihood, divided by N.

    Zhai et al. 2023 (SigLIP), Eq. 1 and Algorithm 1.

    Args:
        image_ND: image features of unit length.
        text_ND: text features of unit length; row i belongs to image i.
        logit_scale: scalar, what similarities are multiplied by.
        logit_bias: scalar, added to every logit.
        identities: not looked at: equal captions in other rows count as negatives.

    Returns:
        Scalar, fp32 (fp64 for fp64 features).

    Raises:
        ValueError: `logit_bias` is None. Without it the N - 1 negatives of each row drown its positive.
    """
    logits_NN = widened(logit_scale) * (widened(image_ND) @ widened(text_ND).T) + bias_of(logit_bias)
    signs_NN = 2.0 * torch.eye(len(image_ND), device=logits_NN.device, dtype=logits_NN.dtype) - 1.0
    return -F.logsigmoid(signs_NN * logits_NN).sum() / len(image_ND)


def bias_of(logit_bias: Tensor | None) -> Tensor:
    """The bias as it enters the logits. Raises ValueError when the model has none."""
    if logit_bias is None:
        raise ValueError("the sigmoid loss needs a model with a logit bias")
    return widened(logit_bias)
