from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune_model.acceleration.lean import PARTS, choose_lean, make_lean
from cliptune_model.attention import AttentionPlan, install, uninstall
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_model.towers.lean_blocks import LeanAttention, PooledBlock
from cliptune_model.towers.text_tower import encode_text

VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": 24, "width": 32, "heads": 2, "layers": 2}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    "clip": (CLIP, VISION, TEXT),
    "clip with patch dropout": (CLIP, VISION | {"patch_dropout": 0.5}, TEXT),
    "custom text, scaled layers": (CustomTextCLIP, VISION | {"ls_init_value": 0.2}, TEXT),
    "average pooling": (CLIP, VISION | {"pool_type": "avg"}, TEXT),
    "siglip's text": (CustomTextCLIP, VISION, TEXT | {"no_causal_mask": True, "pool_type": "last"}),
    "a convolutional tower of timm's": (
        CustomTextCLIP,
        {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
        TEXT,
    ),
    "a resnet": (CLIP, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, TEXT),
    "eos pooling": (CLIP, VISION, TEXT | {"pool_type": "eos", "eos_id": 49407}),
}


def clip_of(kind: str) -> Clip:
    """In float64, with weights large enough that every token matters."""
    model_class, vision, text = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(32, vision, text)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.25)
    clip = build(ModelSource(name="cliptune-test-vit"))
    clip.model, clip.context_length = model.double().train(), 24
    return clip


def lean_copy(clip: Clip, *parts: str) -> Clip:
    lean = copy.copy(clip)
    lean.model = copy.deepcopy(clip.model)
    make_lean(lean, Choice(subject="lean_towers", value=", ".join(parts), reason="a test"))
    return lean


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images_BCHW = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    tokens_BL = torch.randint(1, 40_000, (3, 24), generator=generator)
    for row, end in enumerate((5, 23, 11)):
        tokens_BL[row, end] = 49407
        tokens_BL[row, end + 1 :] = 0
    return images_BCHW, tokens_BL


def features_and_gradients(clip: Clip) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    images_BCHW, tokens_BL = inputs()
    clip.model.zero_grad()
    torch.manual_seed(3)
    image_BD = cast(Any, clip.model).encode_image(images_BCHW)
    text_BD = encode_text(clip.model, tokens_BL)
    logits_BB = F.normalize(image_BD, dim=-1) @ F.normalize(text_BD, dim=-1).T
    torch.autograd.backward(F.cross_entropy(logits_BB, torch.arange(3)))
    gradients = {name: value.grad for name, value in clip.model.named_parameters() if value.grad is not None}
    return image_BD.detach(), text_BD.detach(), gradients


def assert_same(ours: Clip, reference: Clip, tolerance: float = 1e-11) -> None:
    image_BD, text_BD, gradients = features_and_gradients(ours)
    wanted_image_BD, wanted_text_BD, wanted = features_and_gradients(reference)
    assert (image_BD - wanted_image_BD).norm() <= tolerance * wanted_image_BD.norm()
    assert (text_BD - wanted_text_BD).norm() <= tolerance * wanted_text_BD.norm()
    assert gradients.keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= tolerance * largest, name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_gives_the_same_features_and_gradients(kind: str, part: str) -> None:
    clip = clip_of(kind)
    assert_same(lean_copy(clip, part), clip)


def test_all_parts_together_with_attention_in_blocks_give_the_same_too() -> None:
    clip = clip_of("clip")
    lean = lean_copy(clip, *PARTS)
    assert_same(lean, clip)
    install(lean.model, AttentionPlan(mode="chunked", budget_bytes=4096))
    assert_same(lean, clip)
    uninstall(lean.model)
    assert isinstance(cast(Any, lean.model).visual.transformer.resblocks[0].attn, LeanAttention)


def test_weights_keep_their_names_and_open_clips_own_calls_still_work() -> None:
    clip = clip_of("clip")
    lean = lean_copy(clip, *PARTS)
    assert list(lean.model.state_dict()) == list(clip.model.state_dict())
    images_BCHW, tokens_BL = inputs()
    with torch.no_grad():
        wanted = cast(Any, clip.model)(images_BCHW, tokens_BL)
        found = cast(Any, copy.deepcopy(lean.model))(images_BCHW, tokens_BL)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12


def test_only_what_a_part_is_written_for_is_replaced() -> None:
    assert choose_lean(clip_of("clip")).value == "attention, patches, pooling"
    averaged = lean_copy(clip_of("average pooling"), *PARTS)
    pooled = [name for name, module in averaged.model.named_modules() if isinstance(module, PooledBlock)]
    assert pooled == ["transformer.resblocks.1"]
    siglip = lean_copy(clip_of("siglip's text"), *PARTS)
    pooled = [name for name, module in siglip.model.named_modules() if isinstance(module, PooledBlock)]
    assert pooled == ["visual.transformer.resblocks.1"]
    causal = [module.causal for module in siglip.model.modules() if isinstance(module, LeanAttention)]
    assert not any(causal)
    for kind in ("a convolutional tower of timm's", "a resnet"):
        assert choose_lean(clip_of(kind)).value == "attention, pooling, layout"
    clip = clip_of("clip")
    for block in cast(Any, clip.model).visual.transformer.resblocks:
        block.attn = nn.Identity()  # somebody else's attention
    assert choose_lean(clip).value == "attention, patches, pooling"  # the text tower's
    lean = lean_copy(clip, *PARTS)
    found = [name for name, module in lean.model.named_modules() if isinstance(module, LeanAttention)]
    assert found == ["transformer.resblocks.0.attn", "transformer.resblocks.1.attn"]


def test_a_causal_mask_is_recognised_by_its_values_and_another_mask_is_kept() -> None:
    clip = clip_of("clip")
    cast(Any, clip.model).attn_mask[5, 2] = -3.0  # a mask of its own, no longer the causal one
    lean = lean_copy(clip, "attention")
    assert not any(module.causal for module in lean.model.modules() if isinstance(module, LeanAttention))
    assert_same(lean, clip)


def test_half_precision_gives_the_same_to_its_rounding() -> None:
    clip = clip_of("clip")
    clip.model.float()
    lean = lean_copy(clip, *PARTS)
    images_BCHW, tokens_BL = inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = lean.encode_images(images_BCHW.float()), lean.encode_texts(tokens_BL)
        wanted = clip.encode_images(images_BCHW.float()), clip.encode_texts(tokens_BL)
    for ours, theirs in zip(found, wanted, strict=True):
        assert F.cosine_similarity(ours, theirs).min() >= 0.999
