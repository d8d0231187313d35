from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_trainer.accumulation import accumulate
from cliptune_trainer.checkpointing import disable_checkpointing, enable_checkpointing, repeated_blocks
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.precision import Precision
from tests.trainer.towers import distance, gradients, small_batch, small_clip


def taken(clip: Clip, size: int, precision: str = "fp32") -> dict[str, Tensor]:
    torch.manual_seed(4)
    accumulate(clip, LOSSES["infonce"], Precision(precision, "cpu"), small_batch(6), size)
    return gradients(clip)


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes that autograd keeps for the backward pass, counted once a storage."""
    kept: dict[int, int] = {}
    total: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield total
    total.append(sum(kept.values()))


@pytest.mark.parametrize("size", [6, 3])
@pytest.mark.parametrize("kind", ["vit", "dropout", "convnext", "timm-resnet", "resnet", "siglip", "coca"])
def test_gradients_are_the_same_with_and_without(kind: str, size: int) -> None:
    plain, checkpointed = small_clip(kind), small_clip(kind)
    assert enable_checkpointing(checkpointed) > 2
    assert distance(taken(checkpointed, size), taken(plain, size)) <= 1e-5
    for (name, value), other in zip(checkpointed.model.named_buffers(), plain.model.buffers(), strict=True):
        assert torch.allclose(value, other, atol=1e-6), f"{name}: what was computed again was counted again"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_works_under_autocast(precision: str) -> None:
    plain, checkpointed = small_clip("dropout"), small_clip("dropout")
    enable_checkpointing(checkpointed)
    assert distance(taken(checkpointed, 3, precision), taken(plain, 3, precision)) <= 1e-3


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet", "coca"])
def test_less_is_kept(kind: str) -> None:
    clip, batch = small_clip(kind), small_batch(32)
    with kept_bytes() as before:
        clip.encode_images(batch.images_B3HW)
        clip.encode_texts(batch.tokens_BL)
    enable_checkpointing(clip)
    with kept_bytes() as after:
        clip.encode_images(batch.images_B3HW)
        clip.encode_texts(batch.tokens_BL)
    assert after[0] < 0.75 * before[0]


def test_it_can_be_switched_again_and_again() -> None:
    clip = small_clip("vit")
    blocks = list(repeated_blocks(clip.model))
    assert len(blocks) == 4
    plain = [block.forward for block in blocks]
    assert enable_checkpointing(clip) == enable_checkpointing(clip) == 4
    assert all(block.forward != forward for block, forward in zip(blocks, plain, strict=True))
    names = list(clip.model.state_dict())
    disable_checkpointing(clip)
    disable_checkpointing(clip)
    assert [block.forward for block in blocks] == plain
    assert list(clip.model.state_dict()) == names
