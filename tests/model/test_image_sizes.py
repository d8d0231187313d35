"""One model at many image sizes, against open_clip's and timm's own resizing of checkpoints."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune.errors import ImageSizeError, InvalidInputError, SpecError
from cliptune_model.acceleration.compiled import GRAPH_LIMIT, Pass, compile_towers
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.attention import image_tokens
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of, read_manifest
from cliptune_model.image_sizes import asked_size, fitted
from cliptune_model.proven_sizes import ProvenSize
from cliptune_model.source import ModelSource
from cliptune_model.towers.image_tower import image_tower
from cliptune_model.towers.patch_size import resized_patches
from cliptune_model.towers.positions import axis_matrix, resized_positions
from tests.model.conftest import photo

TEXT: dict[str, Any] = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}


def model_of(kind: str, side: int = 32) -> Any:
    """A tower of this kind made for `side`; timm's ViTs are made for 160 whatever is said."""
    text = TEXT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "vit":
            return open_clip.CLIP(32, VIT | {"image_size": side}, text).eval()
        if kind == "resnet":
            vision: dict[str, Any] = {"image_size": side, "layers": (1, 1, 1, 1), "width": 8}
            return open_clip.CLIP(32, vision, text).eval()
        if kind == "siglip":
            text = TEXT | {"no_causal_mask": True, "pool_type": "last"}
            vision = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
            return open_clip.CustomTextCLIP(96, vision | {"image_size": side}, text).eval()
        name, pool = {"timm-vit": ("test_vit", "token"), "convnext": ("test_convnext", "avg")}[kind]
        vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": side}
        return open_clip.CustomTextCLIP(32, vision, text).eval()


def clip_of(kind: str) -> Clip:
    return replace(build(ModelSource(name="cliptune-test-vit")), model=model_of(kind))


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(
        count, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width)
    )


def plain(clip: Clip, pixels: Tensor) -> Tensor:
    """As open_clip embeds them."""
    model: Any = clip.model
    return cast(Tensor, model.encode_image(pixels))


def made_for(trained: Any, height: int, width: int) -> Any:
    """A copy whose positions timm, or plain interpolation, made for that size."""
    model = copy.deepcopy(trained)
    if isinstance(model.visual, TimmModel):
        model.visual.trunk.set_input_size(img_size=(height, width))
        return model
    tower = image_tower(model)
    holder: Any = tower.holder
    own = holder.positional_embedding.detach()
    (h, w), wanted = tower.grid or (0, 0), tower.grid_at((height, width))
    grid = own[1:].reshape(1, h, w, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, wanted, mode="bicubic", antialias=True, align_corners=False)
    holder.positional_embedding = nn.Parameter(torch.cat([own[:1], grid.flatten(2)[0].T]))
    return model


@pytest.mark.parametrize("kind", ["vit", "timm-vit", "siglip"])
@pytest.mark.parametrize("size", [(16, 16), (48, 48), (32, 64), (80, 48)])
def test_a_model_at_another_size_gives_the_vectors_of_one_whose_checkpoint_was_resized_for_it(
    kind: str, size: tuple[int, int]
) -> None:
    model = model_of(kind, 32 if kind == "vit" else 160)
    step = image_tower(model).step
    height, width = (side // 8 * step[0] for side in size)
    clip = replace(clip_of("vit"), model=model)
    pixels = images(height, width)
    with torch.inference_mode():
        expected = made_for(model, height, width).encode_image(pixels)
        assert (clip.encode_images(pixels) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 160)])
def test_so_does_a_convolutional_tower(kind: str, size: tuple[int, int]) -> None:
    model = model_of(kind, 96)
    pixels = images(*size)
    with torch.inference_mode():
        found = replace(clip_of("vit"), model=model).encode_images(pixels)
        if kind == "convnext":
            assert torch.equal(found, model.encode_image(pixels))
        else:
            assert (found - made_for(model, *size).encode_image(pixels)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["vit", "timm-vit", "siglip", "resnet", "convnext"])
def test_the_trained_size_is_computed_by_open_clip_bit_for_bit_also_after_another(kind: str) -> None:
    side = 32 if kind in ("vit", "resnet", "convnext") else 160
    clip = replace(clip_of("vit"), model=model_of(kind, side))
    pixels = images(side, side)
    with torch.inference_mode():
        expected = plain(clip, pixels)
        clip.encode_images(images(2 * side, 2 * side))
        assert torch.equal(clip.encode_images(pixels), expected)


def test_gradients_at_another_size_are_those_of_the_interpolation() -> None:
    grid = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.float64)
    ours = resized_positions(grid, prefix=1, trained=(4, 4), wanted=(6, 6))
    (found,) = torch.autograd.grad((ours * weight).sum(), grid)
    inner = grid[1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    theirs = F.interpolate(inner, (6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(36, 8)
    theirs = torch.cat([grid[:1], theirs])
    (expected,) = torch.autograd.grad((theirs * weight).sum(), grid)
    assert (ours - theirs).abs().max() <= 1e-12
    assert (found - expected).abs().max() <= 1e-12


def test_training_at_another_size_reaches_the_trained_positions_and_changes_no_name() -> None:
    clip = clip_of("vit")
    names = [name for name, _ in clip.model.named_parameters()]
    clip.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip.encode_images(images(48, 48)).square().sum()
    positions = clip.model.get_parameter("visual.positional_embedding")
    (gradient,) = torch.autograd.grad(loss, positions)
    assert float(gradient.abs().sum()) > 0
    assert [name for name, _ in clip.model.named_parameters()] == names


def test_going_from_size_to_size_loses_nothing() -> None:
    clip = clip_of("vit")
    with torch.inference_mode():
        first = clip.encode_images(images(64, 48))
        for side in (8, 128, 16, 32):
            clip.encode_images(images(side, side, count=1))
        assert torch.equal(clip.encode_images(images(64, 48)), first)


def test_lean_towers_take_any_size_too() -> None:
    clip, lean = clip_of("vit"), clip_of("vit")
    make_lean(lean, choose_lean(lean))
    assert type(lean.model.get_submodule("visual")) is VisionTransformer
    with torch.inference_mode():
        pixels = images(48, 64)
        assert (clip.encode_images(pixels) - lean.encode_images(pixels)).abs().max() <= 1e-5


def test_compiled_towers_have_a_graph_for_each_size_and_the_same_results() -> None:
    clip, compiled = clip_of("vit"), clip_of("vit")
    compilation = compile_towers(
        compiled, Choice(subject="compile", value="on", reason="a test"), backend="eager", image_sizes=2
    )
    assert compilation.limit > GRAPH_LIMIT
    passes = [Pass(tokens=0, rows=2, with_graph=True, size=(side, side)) for side in (32, 48)]
    compilation.warm_up(passes, nullcontext)
    assert compilation.graphs == 2
    for side in (32, 48):
        pixels = images(side, side)
        assert (compiled.encode_images(pixels) - clip.encode_images(pixels)).abs().max() <= 1e-5
    assert compilation.graphs == 2


def test_a_clip_at_another_size_shares_its_weights_and_brings_images_to_that_size() -> None:
    clip = clip_of("vit")
    larger = clip.at((48, 64))
    assert larger.model is clip.model
    assert larger.preprocess(photo()).shape == (3, 48, 64)
    assert clip.preprocess(photo()).shape == (3, 32, 32)
    assert image_tokens(larger) == 6 * 8 + 1
    assert image_tokens(clip) == 17
    assert clip.at((32, 32)) is clip


def test_a_size_that_was_seen_before_is_switched_to_without_a_new_matrix() -> None:
    torch.set_num_threads(1)
    positions = nn.Parameter(torch.randn(14 * 14 + 1, 768))  # a ViT-B/16
    sizes = [(6, 6), (10, 10), (18, 18), (14, 20)]
    for wanted in sizes:
        resized_positions(positions, prefix=1, trained=(14, 14), wanted=wanted)
    made = axis_matrix.cache_info().misses
    for wanted in sizes:
        resized_positions(positions, prefix=1, trained=(14, 14), wanted=wanted)
    assert axis_matrix.cache_info().misses == made


@pytest.mark.parametrize("side", [12, 16])
def test_larger_patches_see_in_an_enlarged_patch_what_the_trained_ones_saw(side: int) -> None:
    weight = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    patch = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    enlarged = F.interpolate(patch, (side, side), mode="bicubic", antialias=True)
    expected = F.conv2d(patch, weight)
    assert (F.conv2d(enlarged, resized_patches(weight, side)) - expected).abs().max() <= 1e-9


def test_a_model_of_another_patch_size_is_one_that_open_clip_loads(tmp_path: Any) -> None:
    clip = build(ModelSource(name="cliptune-test-vit", patch_size=4), seed=1)
    assert image_tokens(clip) == 65
    export_model(clip, tmp_path / "model", manifest_of(clip))
    model = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    with torch.inference_mode():
        pixels = images(32, 32)
        assert torch.equal(model.encode_image(pixels), clip.encode_images(pixels))
    same = build(ModelSource(name="cliptune-test-vit", patch_size=8), seed=1)
    assert same.architecture == "cliptune-test-vit"


@pytest.mark.parametrize("side", [5, 0, 64])
def test_a_patch_that_does_not_divide_the_image_is_refused_with_those_that_do(side: int) -> None:
    with pytest.raises(SpecError, match="allowed: 4, 8, 16, 32") as told:
        build(ModelSource(name="cliptune-test-vit", patch_size=side))
    assert told.value.metadata["path"] == "model.patch_size"


def test_sizes_are_rounded_to_the_patch_or_refused_where_exact_was_asked() -> None:
    clip = clip_of("vit")
    assert fitted(clip, (50, 50)) == (48, 48)
    assert fitted(clip, (52, 60)) == (56, 64)
    assert fitted(clip, (48, 32), exact=True) == (48, 32)
    with pytest.raises(
        InvalidInputError, match="is 50; allowed: multiples of the patch, 8, such as 48 or 56"
    ):
        fitted(clip, (50, 50), exact=True)


@pytest.mark.parametrize(("size", "told"), [((7, 32), "at least 8"), ((8000, 8000), "at most 4096")])
def test_a_size_below_one_patch_or_beyond_all_measure_is_refused(size: tuple[int, int], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        fitted(clip_of("vit"), size)


def test_images_that_make_no_whole_patches_are_an_error_with_their_size() -> None:
    with pytest.raises(ImageSizeError, match="images of 50 × 48: the image tower takes multiples of 8 × 8"):
        clip_of("vit").encode_images(images(50, 48))


PROVEN = tuple(
    ProvenSize(
        height=side, width=side, value=value, images_per_second=speed, latency_ms=1e3 / speed, memory_bytes=1
    )
    for side, value, speed in ((16, 0.70, 900.0), (32, 0.90, 400.0), (48, 0.91, 200.0), (64, 0.88, 100.0))
)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ("", (40, 40)),
        ("fast", (16, 16)),
        ("balanced", (32, 32)),
        ("best", (48, 48)),
        ("24", (24, 24)),
        ("30x50", (32, 48)),
    ],
)
def test_a_request_names_pixels_or_one_of_three_words(asked: str, size: tuple[int, int]) -> None:
    assert asked_size(clip_of("vit"), asked, PROVEN, (40, 40)) == size


def test_a_model_that_was_measured_nowhere_answers_the_words_at_its_usual_size() -> None:
    assert [asked_size(clip_of("vit"), word, (), (32, 32)) for word in ("fast", "best")] == [(32, 32)] * 2


@pytest.mark.parametrize("asked", ["huge", "224px", "-8", "8x", "fastest"])
def test_anything_else_is_refused_with_what_is_allowed(asked: str) -> None:
    with pytest.raises(InvalidInputError, match="fast, balanced, best"):
        asked_size(clip_of("vit"), asked, PROVEN, (32, 32))


def test_a_manifest_keeps_what_was_proven(tmp_path: Any) -> None:
    clip = build(ModelSource(name="cliptune-test-vit"))
    manifest = manifest_of(clip, serving_size=(48, 48), proven_sizes=PROVEN)
    export_model(clip, tmp_path / "model", manifest)
    assert read_manifest(tmp_path / "model") == manifest
    assert load_exported(tmp_path / "model").image_size == (32, 32)
