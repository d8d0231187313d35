"""A contrastive loss in which rows with one caption, one image or one label are positives of each other.

With few distinct captions InfoNCE pushes apart pairs that belong together; here they share the target
instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast


def multi_positive(contrast: Contrast, *, labels: float = 0.0) -> Tensor:
    """Mean over rows of the mean negative log-likelihood of the row's positives, in both directions.

    Khosla et al. 2020 (SupCon), Eq. 2 (the sum over positives outside the logarithm), between the two towers
    as in Yang et al. 2022 (UniCL), Eq. 3 to 5. Without repeats it equals InfoNCE.

    Args:
        contrast: the batch; rows with one caption id or one image id are positives of each other.
        labels: other than 0, rows that share a label are too.
    """
    identities = contrast.identities.by_label() if labels else contrast.identities
    logits_NN = contrast.logits()
    # Symmetric, so one mask serves rows and columns.
    positive_NN = identities.same().to(logits_NN.dtype)
    target_NN = positive_NN / positive_NN.sum(dim=1, keepdim=True)
    image_to_text_N = torch.logsumexp(logits_NN, dim=1) - (target_NN * logits_NN).sum(dim=1)
    text_to_image_N = torch.logsumexp(logits_NN, dim=0) - (target_NN.T * logits_NN).sum(dim=0)
    return 0.5 * (image_to_text_N.mean() + text_to_image_N.mean())
