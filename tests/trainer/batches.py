"""Comparing what loaders give."""

from __future__ import annotations

import torch

from cliptune_trainer.data.loading.loader import Batch


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are one, to the bit."""
    return (
        (one.epoch, one.index) == (other.epoch, other.index)
        and torch.equal(one.images_B3HW[:], other.images_B3HW[:])
        and torch.equal(one.tokens_BL, other.tokens_BL)
        and torch.equal(one.image_ids_B, other.image_ids_B)
        and torch.equal(one.caption_ids_B, other.caption_ids_B)
    )
