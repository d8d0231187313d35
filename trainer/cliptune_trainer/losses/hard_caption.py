"""InfoNCE in which every image also meets captions that are nearly right."""

from __future__ import annotations

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast


def hard_caption(contrast: Contrast) -> Tensor:
    """InfoNCE with the wrong captions among the texts that an image is told from; scalar.

    Yuksekgonul et al. 2023 (NegCLIP), section 4: image to text over N captions and M wrong ones, text to
    image over N images. The wrong ones are made by `data.hard_captions`.

    Raises:
        ValueError: the batch has no wrong captions.
    """
    logits_NN = contrast.logits()
    positive_N = logits_NN.diagonal()
    image_to_text_N = torch.logsumexp(torch.cat([logits_NN, contrast.negative_logits()], dim=1), dim=1)
    text_to_image_N = torch.logsumexp(logits_NN, dim=0)
    return 0.5 * ((image_to_text_N - positive_N).mean() + (text_to_image_N - positive_N).mean())
