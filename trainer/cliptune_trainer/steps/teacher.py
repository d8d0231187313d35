"""The model that training started from, frozen, as a teacher of the one that it becomes.

Enters: a batch. Leaves: what the starting model makes of it. Called by accumulation, for losses that keep to
it. It is built anew from its source whenever a run begins or goes on: a checkpoint holds only the student.

N: pairs in the batch, b: pairs that go through the towers at once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses import Teacher
from cliptune_trainer.steps.parts import moved, parts_of
from cliptune_trainer.steps.precision import Precision


class StartingModel:
    """A frozen model. Takes the memory of its weights, and of a few layers while it computes.

    Args:
        clip: the model, on its device; it is frozen and put in evaluation mode.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        clip.model.eval().requires_grad_(False)
        clip.similarity.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch, micro_batch_size: int, precision: Precision) -> Teacher:
        """Its judgement of a batch, the same images that the student sees. Never waits for the device."""
        clip, device = self._clip, self._clip.device
        parts = parts_of(len(batch.tokens_BL), micro_batch_size)
        with precision.autocast():
            images = [clip.encode_images(moved(batch.images_B3HW[rows], device)) for rows in parts]
            texts = [clip.encode_texts(moved(batch.tokens_BL[rows], device)) for rows in parts]
        similarity = clip.similarity
        return Teacher(
            image_ND=similarity.prepare_images(torch.cat(images)),
            text_ND=similarity.prepare_texts(torch.cat(texts)),
            logit_scale=cast(Tensor, clip.model.logit_scale).exp(),
            of_products=similarity.of_products,
        )
