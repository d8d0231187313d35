"""InfoNCE over a batch of pairs: each row's own partner is its one positive.

N: pairs in the batch, D: embedding dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cliptune_trainer.losses.identities import Identities


def infonce(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    identities: Identities,
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies.

    van den Oord et al. 2018 (CPC), Eq. 4, in both directions as in Radford et al. 2021 (CLIP), Figure 3.

    Args:
        image_ND: image features of unit length.
        text_ND: text features of unit length; row i belongs to image i.
        logit_scale: scalar, what similarities are multiplied by.
        logit_bias: not looked at: a softmax does not change with it.
        identities: not looked at: equal captions in other rows count as negatives.

    Returns:
        Scalar, fp32 (fp64 for fp64 features).
    """
    logits_NN = widened(logit_scale) * (widened(image_ND) @ widened(text_ND).T)
    positive_N = logits_NN.diagonal()
    image_to_text_N = torch.logsumexp(logits_NN, dim=1) - positive_N
    text_to_image_N = torch.logsumexp(logits_NN, dim=0) - positive_N
    return 0.5 * (image_to_text_N.mean() + text_to_image_N.mean())


def widened(tensor: Tensor) -> Tensor:
    """In fp32, if the tensor's own format holds less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
