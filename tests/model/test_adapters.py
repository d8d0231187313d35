"""Adapters in models of every layout: what they compute, what is trained, and the weights that result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliptune.errors import ConflictError, SpecError
from cliptune_model.acceleration.compiled import compile_towers
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.adapters import AdapterConfig, SharedBase, attach, base_state, digest, merged_state
from cliptune_model.adapters.layers import find_layers
from cliptune_model.attention import AttentionPlan, install
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from tests.support.adapters import LAYOUTS, VOCABULARY, adapted, features, identity, layout_clip

FOUND = {
    "vit": {"q", "k", "v", "o", "mlp"},
    "separate": {"q", "k", "v", "o", "mlp"},
    "siglip": {"q", "k", "v", "o", "mlp"},
    "efficientnet": {"q", "k", "v", "o", "mlp", "pointwise"},
    "convnext": {"q", "k", "v", "o", "mlp"},
    "resnet": {"q", "k", "v", "o", "mlp", "pointwise"},
    "coca": {"q", "k", "v", "o", "mlp"},
}


def plain(kind: str, state: dict[str, Tensor]) -> Clip:
    """The layout's model without adapters, with these weights."""
    clip = layout_clip(kind)
    clip.model.load_state_dict(state)
    return clip


def trained(clip: Clip) -> set[str]:
    return {name for name, one in clip.model.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(kind: str) -> None:
    clip = layout_clip(kind)
    before = [one.detach() for one in features(clip)]
    state = digest(base_state(clip.model))
    clip = attach(clip, AdapterConfig(), identity(clip))
    assert {target for layer in find_layers(clip) for target in layer.targets} == FOUND[kind]
    for one, two in zip(before, features(clip), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=2e-5)
    assert digest(base_state(clip.model)) == state
    beside = {"logit_scale", "logit_bias"}
    assert all(".adapter." in name or name in beside for name in trained(clip))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_merged_model_computes_as_the_adapted_one_does(kind: str) -> None:
    clip = adapted(layout_clip(kind), AdapterConfig(rank=3, alpha=2.0))
    with torch.no_grad():
        wanted = features(clip)
        changed = features(layout_clip(kind))
        merged = features(plain(kind, merged_state(clip.model)))
    for one, two, base in zip(wanted, merged, changed, strict=True):
        scale = one.abs().max()
        assert (one - base).abs().max() > 1e-3 * scale  # it does something
        assert (one - two).abs().max() <= 1e-5 * max(1.0, float(scale))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_gradients_are_those_of_the_whole_weights_through_the_low_rank_product(kind: str) -> None:
    """W' = W + s·B·A: dB = s·G·Aᵀ and dA = s·Bᵀ·G, where G is the gradient of W' (in fp64)."""
    config = AdapterConfig(rank=2, alpha=3.0, dropout=0.0)
    clip = adapted(layout_clip(kind), config)
    clip.model.double()
    double = layout_clip(kind)
    double.model.double().load_state_dict(merged_state(clip.model))
    for one in (clip, double):
        image, text = features(one, torch.float64)
        (image.sin().sum() + text.cos().sum()).backward()
    whole = dict(double.model.named_parameters())
    checked = 0
    for name, parts in low_rank(clip):
        for key, rows in parts.items():
            down, up = (clip.model.get_parameter(f"{name}.adapter.{key}.{part}") for part in ("down", "up"))
            weight = whole[rows[0]].grad
            assert weight is not None
            gradient = weight.flatten(1)[rows[1]]
            torch.testing.assert_close(up.grad, config.scale * gradient @ down.T, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(down.grad, config.scale * up.T @ gradient, rtol=1e-6, atol=1e-9)
            checked += 1
    assert checked == sum(len(layer.targets) for layer in find_layers(clip))


def low_rank(clip: Clip) -> list[tuple[str, dict[str, tuple[str, slice]]]]:
    """Of each layer, for each of its products: the name of the whole weight, and its rows there."""
    found = []
    for layer in find_layers(clip):
        module: Any = clip.model.get_submodule(layer.name)
        parts: dict[str, tuple[str, slice]] = {}
        for target in layer.targets:
            weight, rows = f"{layer.name}.weight", slice(None)
            if isinstance(module, nn.MultiheadAttention):
                place, width = "qkvo".index(target), module.embed_dim
                weight = f"{layer.name}.out_proj.weight"
                if target != "o":
                    weight, rows = (
                        f"{layer.name}.in_proj_weight",
                        slice(place * width, (place + 1) * width),
                    )
                    if module.in_proj_weight is None:
                        weight, rows = f"{layer.name}.{target}_proj_weight", slice(None)
            elif layer.slices:
                rows = slice(*layer.slices[target])
            parts[target] = (weight, rows)
        found.append((layer.name, parts))
    return found


def test_dropout_acts_on_what_enters_the_product_alone_and_only_in_training() -> None:
    clip = adapted(layout_clip("vit"), AdapterConfig(dropout=0.5, targets=("mlp",)))
    layer: Any = clip.model.get_submodule("visual.transformer.resblocks.0.mlp.c_fc")
    path = layer.adapter["mlp"]
    x = torch.randn(64, 32)
    own = nn.functional.linear(x, layer.weight, layer.bias)
    layer.train()
    torch.manual_seed(3)
    given = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(given - own, 0.5 * dropped @ path.down.T @ path.up.T)
    assert not torch.equal(given, layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x) - own, 0.5 * x @ path.down.T @ path.up.T)


def _lean(clip: Clip) -> None:
    make_lean(clip, choose_lean(clip))


def _compiled(clip: Clip) -> None:
    choice = Choice(subject="compile", value="on", reason="")
    assert compile_towers(clip, choice, backend="aot_eager").choice.value == "on"


def _sliced(clip: Clip) -> None:
    install(clip.model, AttentionPlan(mode="sliced", budget_bytes=4096))


@pytest.mark.parametrize(
    ("kind", "change"),
    [("vit", _lean), ("siglip", _lean), ("vit", _sliced), ("siglip", _sliced), ("vit", _compiled)],
)
def test_towers_in_every_form_give_the_same_features_and_gradients(
    kind: str, change: Callable[[Clip], None]
) -> None:
    clip = adapted(layout_clip(kind))
    other = replace(clip, model=deepcopy(clip.model))
    change(other)
    found = []
    for one in (clip, other):
        one.model.train()
        image, text = one.encode_images(torch.ones(2, 3, 32, 32)), one.encode_texts(words_of_two())
        (image.sin().sum() + text.cos().sum()).backward()
        gradients = [p.grad for name, p in one.model.named_parameters() if name.endswith((".up", ".down"))]
        found.append([image, text, *gradients])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


def words_of_two() -> Tensor:
    tokens_BL = torch.zeros(2, 16, dtype=torch.int64)
    tokens_BL[:, :3], tokens_BL[:, 3] = 7, VOCABULARY - 1
    return tokens_BL


def test_under_autocast_the_products_are_half_and_their_gradients_whole() -> None:
    clip = adapted(layout_clip("vit"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, text = features(clip)
    (image.float().sum() + text.float().sum()).backward()
    found = [p.grad for name, p in clip.model.named_parameters() if ".adapter." in name]
    assert found
    assert all(one is not None and one.dtype == torch.float32 and one.isfinite().all() for one in found)


@pytest.mark.parametrize("kind", ["vit", "siglip", "separate"])
def test_a_bottleneck_follows_attention_and_mlp_begins_as_nothing_and_cannot_be_merged(kind: str) -> None:
    clip = layout_clip(kind)
    before = [one.detach() for one in features(clip)]
    clip = attach(clip, AdapterConfig(kind="bottleneck", rank=4, dropout=0.0), identity(clip))
    for one, two in zip(before, features(clip), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=2e-5)
    places = {
        name.partition(".adapter.")[0].rpartition(".")[2] for name in trained(clip) if "adapter" in name
    }
    assert places <= {"attn", "proj", "out_proj", "c_proj", "fc2", "attn_pool"}
    sum(one.sin().sum() for one in features(clip)).backward()  # type: ignore[union-attr]
    assert any(p.grad is not None and p.grad.any() for p in clip.model.parameters())
    with pytest.raises(ConflictError, match="no weight can hold it"):
        merged_state(clip.model)


@pytest.mark.parametrize("kind", ["vit", "siglip", "efficientnet"])
def test_adapters_over_one_base_share_its_weights_and_answer_each_by_itself(kind: str) -> None:
    base = layout_clip(kind)
    shared = SharedBase(base)
    one, two = adapted(shared.copy(), seed=1), adapted(shared.copy(), AdapterConfig(rank=4), seed=2)
    with torch.no_grad():
        first, second = features(one)[1], features(two)[1]
        alone = features(adapted(layout_clip(kind), seed=1))[1]
        bare = features(base)[1]
    torch.testing.assert_close(first, alone)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, bare)
    held = {tensor.data_ptr() for tensor in base.model.parameters()}
    for clip in (one, two):
        own = {p.data_ptr() for name, p in clip.model.named_parameters() if ".adapter." not in name}
        assert own <= held
    assert SharedBase(one).sha256 == shared.sha256 == digest(base_state(base.model))


def test_a_tower_may_be_left_without_an_adapter() -> None:
    clip = layout_clip("vit")
    clip = attach(clip, AdapterConfig(), identity(clip), image=False)
    assert trained(clip)
    assert not any(name.startswith("visual.") for name in trained(clip))


def test_only_the_layers_that_were_asked_for_get_one() -> None:
    clip = layout_clip("vit")
    clip = attach(clip, AdapterConfig(targets=("q", "v")), identity(clip))
    assert {name.split(".adapter.")[1][0] for name in trained(clip) if ".adapter." in name} == {"q", "v"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (AdapterConfig(targets=("pointwise",)), "has no layers pointwise; it has: q, k, v, o, mlp"),
        (AdapterConfig(targets=("q", "pointwise")), "has no layers pointwise"),
    ],
    ids=["alone", "beside"],
)
def test_a_base_without_the_layers_asked_for_is_told_with_those_that_it_has(
    config: AdapterConfig, told: str
) -> None:
    clip = layout_clip("vit")
    with pytest.raises(SpecError, match=told) as raised:
        attach(clip, config, identity(clip))
    assert raised.value.metadata["path"] == "adapter.targets"
    assert trained(clip) == {name for name, _ in clip.model.named_parameters()}


def test_a_second_adapter_is_refused() -> None:
    clip = adapted(layout_clip("vit"))
    with pytest.raises(ConflictError, match="carries an adapter already"):
        attach(clip, AdapterConfig(), identity(clip))


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "prefix"), ("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("targets", ("head",))],
)
def test_a_value_out_of_range_is_told_with_what_is_allowed(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"adapter.{field}"), nullcontext():
        AdapterConfig(**{field: value})
