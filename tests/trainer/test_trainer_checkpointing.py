from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cliptune_model.clip import Clip
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.checkpointing import (
    Checkpointed,
    disable_checkpointing,
    enable_checkpointing,
    repeated_blocks,
)
from cliptune_trainer.steps.precision import Precision
from tests.trainer.towers import distance, gradients, small_batch, small_clip


def taken(clip: Clip, size: int, precision: str = "fp32") -> dict[str, Tensor]:
    torch.manual_seed(4)
    accumulate(clip, Objective(), Precision(precision, "cpu"), small_batch(6), size)
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


class NoisyBlock(nn.Module):
    """Dropout from a generator that torch's checkpoint does not know, as it does not know Apple's."""

    generator = torch.Generator().manual_seed(0)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x_BD: Tensor) -> Tensor:  # noqa: N803
        mask_BD = torch.rand(x_BD.shape, generator=self.generator) > 0.5
        return self.layer((x_BD * mask_BD).exp())


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_on_mps_the_masks_of_the_first_computation_are_drawn_again(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = NoisyBlock.generator
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    block, x_BD = NoisyBlock(), torch.randn(4, 8)

    def gradient(forward: Callable[[Tensor], Tensor]) -> Tensor:
        generator.manual_seed(9)
        block.zero_grad()
        forward(x_BD.clone().requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]
        assert block.layer.weight.grad is not None
        after = torch.rand((), generator=generator)
        ends.append(float(after))
        return block.layer.weight.grad.clone()

    ends: list[float] = []
    wanted = gradient(block)
    found = gradient(Checkpointed(block.forward, torch.device(device)))
    assert torch.equal(found, wanted) == (device == "mps"), "torch's checkpoint alone draws another mask"
    assert (ends[0] == ends[1]) == (device == "mps")


def test_a_copy_of_a_checkpointed_model_computes_with_its_own_weights() -> None:
    clip, batch = small_clip("vit"), small_batch(4)
    enable_checkpointing(clip)
    copy = replace(clip, model=deepcopy(clip.model))
    wanted = copy.encode_texts(batch.tokens_BL).detach()
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.zero_()
    copy.encode_texts(batch.tokens_BL).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(copy.encode_texts(batch.tokens_BL), wanted)
    assert all(parameter.grad is None for parameter in clip.model.parameters())


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
