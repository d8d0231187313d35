"""InfoNCE over a batch of pairs: each row's own partner is its one positive."""

from __future__ import annotations

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast


def infonce(contrast: Contrast) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies; scalar.

    van den Oord et al. 2018 (CPC), Eq. 4, in both directions as in Radford et al. 2021 (CLIP), Figure 3.
    Equal captions in other rows count as negatives.
    """
    logits_NN = contrast.logits()
    positive_N = logits_NN.diagonal()
    image_to_text_N = torch.logsumexp(logits_NN, dim=1) - positive_N
    text_to_image_N = torch.logsumexp(logits_NN, dim=0) - positive_N
    return 0.5 * (image_to_text_N.mean() + text_to_image_N.mean())
