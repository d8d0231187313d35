"""Weights frozen for serving: the same vectors, nothing else changed, and out of the way where they fail."""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any, cast

import open_clip
import pytest
import torch
from torch import Tensor, nn

from cliptune_model.acceleration import frozen as frozen_module
from cliptune_model.acceleration import frozen_blocks
from cliptune_model.acceleration.folded import fold
from cliptune_model.acceleration.frozen import TOLERANCE, freeze
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from tests.support.models import TEST_MODEL

torch.set_num_threads(1)

MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="no MKL")  # type: ignore[no-untyped-call]
TEXT: dict[str, Any] = {"context_length": 24, "width": 64, "heads": 2, "layers": 2}
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
TIMM = {"timm_model_pretrained": False, "image_size": 32, "timm_pool": "token", "timm_proj": "linear"}
MODELS: dict[str, dict[str, Any]] = {
    "open_clip": {},
    "quick gelu": {"quick_gelu": True},
    "average pool": {"vision": VISION | {"pool_type": "avg"}},
    "timm": {"vision": {**TIMM, "timm_model_name": "vit_tiny_patch16_224"}},
    "convolutional": {"vision": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}},
}


def clip_of(kind: str = "open_clip", seed: int = 3, device: str = "cpu") -> Clip:
    """As the engine has it when it begins to serve, with weights that matter."""
    given = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(
            32, given.get("vision", VISION), TEXT, quick_gelu=given.get("quick_gelu", False)
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    clip = build(ModelSource(name=TEST_MODEL))
    clip = dataclasses.replace(
        clip, model=model.to(device).eval().requires_grad_(False), image_size=(32, 32), context_length=24
    )
    clip.tokenizer = open_clip.SimpleTokenizer(context_length=24)
    make_lean(clip, choose_lean(clip))
    return clip


def images(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def vectors(clip: Clip, count: int, texts: list[str]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        device = clip.device
        return (
            clip.encode_images(images(count).to(device)),
            clip.encode_texts(clip.tokenize_trimmed(texts).to(device)),
        )


@MKL
@pytest.mark.parametrize("kind", MODELS)
def test_packed_towers_give_the_same_vectors_alone_and_in_batches(kind: str) -> None:
    clip = clip_of(kind)
    frozen = freeze(clip)
    assert frozen.choice.value == "packed", frozen.choice
    assert frozen.bytes > 0
    for count, texts in ((1, ["a cat"]), (7, ["a cat", "two dogs run across the street", "!"])):
        for wanted_BD, found_BD in zip(
            vectors(clip, count, texts), vectors(frozen.clip, count, texts), strict=True
        ):
            assert ((found_BD - wanted_BD).norm(dim=-1) <= TOLERANCE * wanted_BD.norm(dim=-1)).all()


@MKL
def test_a_frozen_model_shares_its_weights_with_the_one_it_is_from_and_leaves_that_as_it_was() -> None:
    clip = clip_of("quick gelu")
    before = vectors(clip, 2, ["a cat"])
    kinds = [type(module) for module in clip.model.modules()]
    frozen = freeze(clip)
    assert [type(module) for module in clip.model.modules()] == kinds
    assert kinds != [type(module) for module in frozen.clip.model.modules()]
    ours, theirs = dict(frozen.clip.model.named_parameters()), dict(clip.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    for one, other in zip(before, vectors(clip, 2, ["a cat"]), strict=True):
        assert torch.equal(one, other)


@MKL
def test_a_model_answers_bit_by_bit_as_before_while_it_is_frozen_on_another_thread() -> None:
    clip = clip_of("quick gelu")
    wanted = vectors(clip, 3, ["a cat"])
    ended = threading.Event()
    differing: list[int] = []

    def serve() -> None:
        while not ended.is_set():
            found = vectors(clip, 3, ["a cat"])
            differing.extend(1 for one, other in zip(found, wanted, strict=True) if not one.equal(other))

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        assert all(freeze(clip).choice.value == "packed" for _ in range(3))
    finally:
        ended.set()
        serving.join()
    assert not differing


@MKL
def test_folded_towers_are_frozen_too_and_share_their_kernels() -> None:
    clip = clip_of("convolutional")
    folded, choice = fold(clip)
    assert choice.value == "on"
    frozen = freeze(folded)
    assert frozen.choice.value == "packed", frozen.choice
    folded_weights = [m._weight for m in cast(Any, folded.model).visual.modules() if hasattr(m, "_weight")]
    frozen_weights = [
        m._weight for m in cast(Any, frozen.clip.model).visual.modules() if hasattr(m, "_weight")
    ]
    assert folded_weights
    assert all(one is other for one, other in zip(folded_weights, frozen_weights, strict=True))
    for wanted_BD, found_BD in zip(
        vectors(folded, 3, ["a cat"]), vectors(frozen.clip, 3, ["a cat"]), strict=True
    ):
        torch.testing.assert_close(found_BD, wanted_BD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["open_clip", "quick gelu", "timm"])
def test_weights_cast_once_give_bit_by_bit_what_autocast_gives(kind: str) -> None:
    clip = clip_of(kind)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    frozen = freeze(clip, dtype=torch.bfloat16, autocast=autocast)
    assert frozen.choice.value == "bf16", frozen.choice
    with autocast():
        for wanted_BD, found_BD in zip(
            vectors(clip, 3, ["a cat"]), vectors(frozen.clip, 3, ["a cat"]), strict=True
        ):
            assert torch.equal(found_BD, wanted_BD)


@MKL
def test_without_room_or_when_it_is_not_wanted_any_more_the_model_stays_as_it_is() -> None:
    clip = clip_of()
    small = freeze(clip, room_bytes=100_000)
    assert small.clip is clip
    assert small.choice.value == "off"
    assert "of 0 free" in small.choice.reason
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(0)
        return len(asked) > 9

    gone = freeze(clip, stopped=stopped)
    assert gone.clip is clip
    assert "unloaded" in gone.choice.reason
    assert len(asked) == 10


@MKL
def test_a_short_text_by_frozen_weights_is_open_clips_padded_one() -> None:
    text = {"context_length": 77, "width": 512, "heads": 8, "layers": 12}  # ViT-B/32's
    plain = open_clip.CLIP(512, VISION, text).eval().requires_grad_(False)
    clip = dataclasses.replace(clip_of(), model=copy.deepcopy(plain), context_length=77)
    clip.tokenizer = open_clip.SimpleTokenizer(context_length=77)
    make_lean(clip, choose_lean(clip))
    served = freeze(clip).clip
    assert served is not clip
    texts = ["a photo of a cat", "7", "a red car parked by the sea at night"]
    with torch.inference_mode():
        tokens_BL = served.tokenize_trimmed(texts)
        assert tokens_BL.shape == (3, 16)
        found_BD = nn.functional.normalize(served.encode_texts(tokens_BL), dim=-1)
        wanted_BD = plain.encode_text(open_clip.tokenize(texts), normalize=True)
    assert float((found_BD - wanted_BD).abs().max()) <= 1e-5


def test_nothing_is_frozen_on_apples_gpu_where_it_is_not_proved() -> None:
    clip = clip_of()

    class Elsewhere(Clip):
        @property
        def device(self) -> torch.device:
            return torch.device("mps")

    fields = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip)}
    there = Elsewhere(**fields)
    for dtype in (None, torch.float16):
        result = freeze(there, dtype=dtype)
        assert result.clip is there
        assert "Apple" in result.choice.reason


@MKL
def test_a_kernel_that_computes_something_else_is_found_out_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(frozen_blocks.PackedProduct):
        def __call__(self, x: Tensor) -> Tensor:
            found = super().__call__(x)
            return found * (1.001 if x.numel() // x.shape[-1] == 50 else 1.0)

    monkeypatch.setattr(frozen_module, "PackedProduct", Wrong)
    clip = clip_of()
    result = freeze(clip)
    assert result.clip is clip
    assert "50 rows" in result.choice.reason


@MKL
def test_weights_that_are_not_numbers_are_left_to_answer_for_themselves() -> None:
    clip = clip_of()
    cast(Any, clip.model).visual.conv1.weight.fill_(float("nan"))
    result = freeze(clip)
    assert result.clip is clip
    assert result.choice.value == "off"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_weights_cast_once_give_bit_by_bit_what_autocast_gives(dtype: torch.dtype) -> None:
    clip = clip_of(device="cuda")

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", dtype)

    frozen = freeze(clip, dtype=dtype, autocast=autocast)
    assert frozen.choice.value in ("bf16", "fp16"), frozen.choice
    with autocast():
        for wanted_BD, found_BD in zip(
            vectors(clip, 3, ["a cat"]), vectors(frozen.clip, 3, ["a cat"]), strict=True
        ):
            assert torch.equal(found_BD, wanted_BD)
