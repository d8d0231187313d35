from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from cliptune_model.acceleration import compiled
from cliptune_model.acceleration.compiled import Compilation, Pass, compile_towers
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.attention import AttentionPlan, install
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.steps.checkpointing import enable_checkpointing

ON = Choice(subject="compile", value="on", reason="asked for")
ROWS = 3


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def pair() -> tuple[Clip, Clip]:
    """A small model in training, and a copy to be compiled."""
    clip = build(ModelSource(name="cliptune-test-vit"), seed=2)
    clip.model.train()
    other = copy.copy(clip)
    other.model = copy.deepcopy(clip.model)
    return clip, other


def features_and_gradients(clip: Clip) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    images_BCHW = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    clip.model.zero_grad()
    image_BD, text_BD = clip.encode_images(images_BCHW), clip.encode_texts(clip.tokenize(["a", "b", "c d"]))
    torch.autograd.backward((image_BD * text_BD).sum())
    gradients = {name: value.grad for name, value in clip.model.named_parameters() if value.grad is not None}
    return image_BD.detach(), text_BD.detach(), gradients


def assert_same(ours: Clip, reference: Clip) -> None:
    *features, gradients = features_and_gradients(ours)
    *wanted_features, wanted = features_and_gradients(reference)
    for one, other in zip(features, wanted_features, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert gradients.keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    assert all((gradients[name] - wanted[name]).norm() <= 1e-5 * largest for name in wanted)


def traced(clip: Clip, backend: str = "eager") -> Compilation:
    """Dynamo as in earnest; its graphs are run by torch's own kernels: fast, and no compiler needed."""
    return compile_towers(clip, ON, backend=backend)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_compiled_towers_give_the_same_features_and_gradients(pair: tuple[Clip, Clip]) -> None:
    clip, ours = pair
    compilation = compile_towers(ours, ON)
    assert_same(ours, clip)
    assert compilation.choice == ON
    assert compilation.graphs == 2  # blocks of one tower share theirs
    assert compilation.compile_s > 0
    assert list(ours.model.state_dict()) == list(clip.model.state_dict())


@pytest.mark.parametrize(
    ("with_lean", "with_checkpointing", "mode", "backend"),
    [
        (False, True, "sdpa", "aot_eager"),
        (True, False, "chunked", "eager"),
        (True, True, "sliced", "eager"),
    ],
)
def test_compilation_goes_with_lean_towers_checkpointing_and_every_attention(
    pair: tuple[Clip, Clip], with_lean: bool, with_checkpointing: bool, mode: str, backend: str
) -> None:
    clip, ours = pair
    if with_lean:
        make_lean(ours, choose_lean(ours))
    install(ours.model, AttentionPlan(mode=mode, budget_bytes=10_000))
    if with_checkpointing:
        enable_checkpointing(ours)
    compilation = traced(ours, backend)
    assert_same(ours, clip)
    assert compilation.choice == ON
    assert compilation.graphs >= 2


def test_a_warm_up_compiles_both_passes_of_accumulation_before_the_first_step(
    pair: tuple[Clip, Clip],
) -> None:
    _, ours = pair
    compilation = traced(ours)
    random, weights = torch.get_rng_state(), copy.deepcopy(ours.model.state_dict())
    passes = {
        Pass(tokens=tokens, rows=ROWS, with_graph=with_graph)
        for tokens in (0, 16)
        for with_graph in (False, True)
    }
    compilation.warm_up(passes, nullcontext)
    graphs = compilation.graphs
    assert graphs == 4
    with torch.no_grad():
        ours.encode_texts(ours.tokenize(["a", "b", "c"]))
    features_and_gradients(ours)
    assert compilation.graphs == graphs
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in ours.model.state_dict().items())


def test_evaluation_with_its_many_shapes_is_not_compiled(pair: tuple[Clip, Clip]) -> None:
    _, ours = pair
    compilation = traced(ours)
    ours.model.eval()
    with torch.no_grad():
        for rows in (1, 2, 3):
            ours.encode_texts(ours.tokenize(["a"] * rows))
    assert compilation.graphs == 0


def test_beyond_the_limit_of_graphs_other_shapes_run_as_they_are(
    pair: tuple[Clip, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, ours = pair
    monkeypatch.setattr(compiled, "GRAPH_LIMIT", 1)
    compilation = traced(ours)
    assert_same(ours, clip)
    assert compilation.graphs == 1


def test_where_the_compiler_fails_the_towers_run_as_they_are_and_the_reason_is_kept(
    pair: tuple[Clip, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, ours = pair
    monkeypatch.setenv("CXX", "/nowhere/g++")
    # Not by monkeypatch: what it puts back, torch's settings take for taken away.
    with inductor_config.patch({"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False}):
        compilation = compile_towers(ours, ON)
        assert_same(ours, clip)
    assert compilation.choice.value == "off"
    assert "the compiler failed" in compilation.choice.reason
    assert compilation.graphs == 0


def test_a_stopped_compilation_leaves_the_model_as_it_was(pair: tuple[Clip, Clip]) -> None:
    clip, ours = pair
    compilation = traced(ours)
    compilation.stop("enough")
    assert compilation.choice == Choice(subject="compile", value="off", reason="enough")
    assert all(module._compiled_call_impl is None for module in ours.model.modules())
    assert_same(ours, clip)
    assert compilation.graphs == 0


def test_copies_of_a_compiled_model_are_not_compiled(pair: tuple[Clip, Clip]) -> None:
    clip, ours = pair
    traced(ours)
    copied = copy.copy(ours)
    copied.model = copy.deepcopy(ours.model)
    assert all(module._compiled_call_impl is None for module in copied.model.modules())
    assert_same(copied, clip)


def test_towers_without_transformer_blocks_and_a_choice_of_off_are_left_alone(
    pair: tuple[Clip, Clip],
) -> None:
    _, ours = pair
    off = Choice(subject="compile", value="off", reason="asked for")
    assert compile_towers(ours, off).choice == off
    model = cast(Any, ours.model)
    model.visual, model.transformer = torch.nn.Identity(), torch.nn.Identity()
    assert "no tower" in compile_towers(ours, ON).choice.reason
