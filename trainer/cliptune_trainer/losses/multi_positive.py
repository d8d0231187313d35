"""A contrastive loss in which rows with one caption, or one image, are positives of each other.

With few distinct captions InfoNCE pushes apart pairs that belong together; here they share the target
instead. N: pairs in the batch, D: embedding dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.infonce import widened


def multi_positive(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    identities: Identities,
) -> Tensor:
    """Mean over rows of the mean negative log-likelihood of the row's positives, in both directions.

    Khosla et al. 2020 (SupCon), Eq. 2 (the sum over positives outside the logarithm), between the two towers
    as in Yang et al. 2022 (UniCL). Without repeats it equals InfoNCE.

    Args:
        image_ND: image features of unit length.
        text_ND: text features of unit length; row i belongs to image i.
        logit_scale: scalar, what similarities are multiplied by.
        logit_bias: not looked at: a softmax does not change with it.
        identities: rows with one caption id or one image id are positives of each other.

    Returns:
        Scalar, fp32 (fp64 for fp64 features).
    """
    logits_NN = widened(logit_scale) * (widened(image_ND) @ widened(text_ND).T)
    # Symmetric, so one mask serves rows and columns.
    positive_NN = identities.same().to(logits_NN.dtype)
    target_NN = positive_NN / positive_NN.sum(dim=1, keepdim=True)
    image_to_text_N = torch.logsumexp(logits_NN, dim=1) - (target_NN * logits_NN).sum(dim=1)
    text_to_image_N = torch.logsumexp(logits_NN, dim=0) - (target_NN.T * logits_NN).sum(dim=0)
    return 0.5 * (image_to_text_N.mean() + text_to_image_N.mean())
