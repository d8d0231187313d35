"""Batch norms folded into convolutions for inference: the same vectors, and nothing else changed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import open_clip
import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from cliptune_model.acceleration.folded import TOLERANCE, fold
from cliptune_model.acceleration.folded_blocks import FoldedConvolution
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource

SIZE = 64
TEXT: dict[str, Any] = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "mlp"}
TOWERS: dict[str, dict[str, Any]] = {
    "lite": {**TIMM, "timm_model_name": "tf_efficientnet_lite0", "image_size": SIZE},
    "odd size": {**TIMM, "timm_model_name": "tf_efficientnet_lite0", "image_size": 57},
    "swish and squeeze": {**TIMM, "timm_model_name": "efficientnet_b0", "image_size": SIZE},
    "timm's resnet": {**TIMM, "timm_model_name": "resnet18", "image_size": SIZE},
    "open_clip's resnet": {"layers": [1, 1, 1, 1], "width": 16, "image_size": SIZE},
}
ONEDNN = torch.backends.mkldnn.is_available()


def clip_of(tower: nn.Module | dict[str, Any], size: int = SIZE) -> Clip:
    """With norms that have seen something, so that folding them matters."""
    generator = torch.Generator().manual_seed(4)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tower if isinstance(tower, dict) else TOWERS["open_clip's resnet"]
        model = open_clip.CLIP(32, config, TEXT)
    if isinstance(tower, nn.Module):
        model.visual = tower
    for module in model.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.2, 0.2),
            ):
                cast(Tensor, values).uniform_(low, high, generator=generator)
    clip = build(ModelSource(name="cliptune-test-vit"))
    return dataclasses.replace(clip, model=model.eval(), image_size=(size, size), context_length=16)


def images(count: int, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", TOWERS)
def test_a_folded_tower_gives_the_same_vectors_alone_and_in_batches(kind: str) -> None:
    size = TOWERS[kind]["image_size"]
    clip = clip_of(TOWERS[kind], size)
    folded, choice = fold(clip)
    assert choice.value == "on", choice
    assert not any(isinstance(module, nn.BatchNorm2d) for module in cast(Any, folded.model).visual.modules())
    with torch.inference_mode():
        for count in (1, 7):
            wanted_BD = clip.encode_images(images(count, size))
            found_BD = folded.encode_images(images(count, size))
            assert ((found_BD - wanted_BD).norm(dim=-1) <= TOLERANCE * wanted_BD.norm(dim=-1)).all()
        cast(Any, folded.model).visual.rows = 2  # parts of a batch
        torch.testing.assert_close(
            folded.encode_images(images(5, size)), clip.encode_images(images(5, size)), rtol=1e-4, atol=1e-5
        )


def test_the_model_that_was_folded_is_left_as_it_was_and_trains_as_before() -> None:
    clip = clip_of(TOWERS["lite"])
    twin = dataclasses.replace(clip, model=copy.deepcopy(clip.model))
    folded, _ = fold(clip)
    assert folded.model is not clip.model
    assert cast(Any, folded.model).transformer is cast(Any, clip.model).transformer
    for one in (clip, twin):
        one.model.train()
        torch.autograd.backward(one.encode_images(images(3)).square().sum())
    ours, theirs = dict(clip.model.named_parameters()), dict(twin.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].grad is None) == (value.grad is None)
        if value.grad is not None:
            assert torch.equal(cast(Tensor, ours[name].grad), value.grad), name
    for name, kept in twin.model.state_dict().items():  # what is exported
        assert torch.equal(clip.model.state_dict()[name], kept), name


def test_towers_without_such_norms_are_served_as_they_are() -> None:
    clip = build(ModelSource(name="cliptune-test-vit"))
    same, choice = fold(clip)
    assert same is clip
    assert (choice.value, choice.reason) == ("off", "the image tower has no batch norm")


class NormFirst(nn.Module):
    """Each norm reads what is no convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 32, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.conv(self.norm(images))).mean((2, 3))


class AlsoReadElsewhere(nn.Module):
    """The convolution's own result is added again after the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 8, stride=8)
        self.norm = nn.BatchNorm2d(32)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return cast(Tensor, maps + self.norm(maps)).mean((2, 3))


@pytest.mark.parametrize(
    ("tower", "reason"), [(NormFirst, "directly follows"), (AlsoReadElsewhere, "of its length away")]
)
def test_what_cannot_be_folded_is_found_out_and_left(tower: type[nn.Module], reason: str) -> None:
    clip = clip_of(tower())
    same, choice = fold(clip)
    assert same is clip
    assert choice.value == "off"
    assert reason in choice.reason


def test_weights_that_are_not_numbers_are_left_to_answer_for_themselves() -> None:
    clip = clip_of(TOWERS["open_clip's resnet"])
    cast(Any, clip.model).visual.conv1.weight.data.fill_(float("nan"))
    assert fold(clip)[0] is clip


@pytest.mark.parametrize(
    "fused",
    [False, pytest.param(True, marks=pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN"))],
)
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU])
@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8),
        nn.Conv2d(8, 12, (1, 3), padding=(0, 2), dilation=(1, 2)),
        Conv2dSame(8, 8, 3, stride=2, groups=8),
        Conv2dSame(8, 12, 5, stride=2, bias=False),
        Conv2dSame(8, 12, 3, stride=3),
    ],
    ids=["plain", "depthwise", "dilated", "same, depthwise", "same, five", "same, by three"],
)
def test_a_folded_convolution_is_the_three_layers(
    convolution: nn.Conv2d, activation: type[nn.Module], fused: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    norm = BatchNormAct2d(convolution.out_channels, act_layer=activation).eval()
    norm.running_var.uniform_(0.5, 2.0, generator=generator)
    norm.running_mean.uniform_(-1.0, 1.0, generator=generator)
    for shape in ((3, 8, 18, 14), (1, 8, 15, 16)):
        maps_BCHW = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = norm(convolution(maps_BCHW))
            assert FoldedConvolution.takes(convolution, maps_BCHW.shape)
            folded = FoldedConvolution(convolution, norm, norm.act, maps_BCHW.shape, rows=2, fused=fused)
            found = folded(maps_BCHW)
            found = found if folded.activates else norm.act(found)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            other = maps_BCHW[..., 1:, :-2]  # another size: what is padded follows from it
            found = folded(other) if folded.activates else norm.act(folded(other))
            torch.testing.assert_close(found, norm(convolution(other)), rtol=1e-4, atol=1e-5)


def test_padding_that_cannot_be_made_even_is_not_taken() -> None:
    shape = torch.Size((1, 8, 16, 16))
    assert not FoldedConvolution.takes(nn.Conv2d(8, 8, 3, padding="same"), shape)
    assert not FoldedConvolution.takes(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), shape)
    assert not FoldedConvolution.takes(Conv2dSame(8, 8, 3, stride=2, dilation=2), torch.Size((1, 8, 15, 16)))
