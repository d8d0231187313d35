"""A contrastive loss whose targets are shared out by how much of their labels two rows have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast, both_ways


def soft_target(contrast: Contrast, *, sharpness: float = 1.0) -> Tensor:
    """Cross-entropy between softmaxes of label similarity and of logits, in both directions; scalar.

    Wang et al. 2022 (MedCLIP), Eq. 2 to 7: the target of row i is softmax over j of cos(labels i, labels j),
    where labels are multi-hot. Rows that share image or caption are wholly alike, with or without labels.

    Args:
        contrast: the batch, with labels.
        sharpness: what label similarities are multiplied by before the softmax. MedCLIP has 1, which leaves a
            row's own text little more than any other; towards infinity rows of equal labels share the target
            evenly, as in `multi_positive`.

    Raises:
        ValueError: the batch has no labels.
    """
    logits_NN = contrast.logits()
    # Alikeness is symmetric: a text's target among images is its image's among texts.
    target_NN = torch.softmax(sharpness * contrast.identities.alike().to(logits_NN.dtype), dim=1)
    return both_ways(lambda rows_NN: -(target_NN * torch.log_softmax(rows_NN, dim=1)).sum(dim=1), logits_NN)
