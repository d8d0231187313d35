"""Keeping to what the starting model knew: its judgement of the batch is the target."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune_trainer.losses.contrast import Contrast


def distillation(contrast: Contrast) -> Tensor:
    """Divergence of the model's softmaxes over the batch from the starting model's; scalar, 0 or more.

    Yang et al. 2024 (CLIP-KD), contrastive relational distillation: KL(teacher, student) of image to text and
    of text to image, averaged over rows; with the model before training as the teacher, as in Li and Hoiem
    2017 (LwF). It is 0 at the start, and meant as a term beside others.

    Raises:
        ValueError: the starting model was not asked.
    """
    if contrast.teacher is None:
        raise ValueError("distillation needs what the starting model makes of the batch")
    logits_NN = contrast.logits()
    teacher_NN = contrast.teacher.logits().to(logits_NN.dtype)
    ways = [
        F.kl_div(
            torch.log_softmax(student, dim=1),
            torch.log_softmax(teacher, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        for student, teacher in ((logits_NN, teacher_NN), (logits_NN.T, teacher_NN.T))
    ]
    return 0.5 * (ways[0] + ways[1])
