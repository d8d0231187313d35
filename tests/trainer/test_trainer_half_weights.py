from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cliptune_model.acceleration.compiled import compile_towers
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.memory.count import LiveBytes
from cliptune_trainer.steps import half_weights
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.checkpointing import enable_checkpointing
from cliptune_trainer.steps.half_weights import HalfWeights, choose_half_weights
from cliptune_trainer.steps.larger_parts import passes_of
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step, StepOutOfMemoryError
from tests.trainer.towers import gradients, small_batch, small_clip

BF16 = Precision("bf16", "cpu")
ON = Choice(subject="half_weights", value="on", reason="a test")
ROWS, PART = 8, 3  # parts of two lengths


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


def halves_of(clip: Clip, precision: Precision = BF16) -> HalfWeights:
    halves = HalfWeights.of(clip, precision, ON)
    assert halves is not None
    return halves


def gradient(
    clip: Clip, halves: HalfWeights | None, precision: Precision = BF16, *, full: bool = False
) -> dict[str, Tensor]:
    torch.manual_seed(1)  # of random layers
    batch = small_batch(ROWS, full=full)
    value = accumulate(clip, Objective(), precision, batch, PART, half_weights=halves)
    return {**gradients(clip), "the loss": value}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit by bit, where a number overflowed too."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("vit", "bf16"), ("vit", "fp16"), ("siglip", "fp16"), ("coca", "bf16"), ("patch-dropout", "bf16")],
)
def test_gradients_are_those_of_autocast_bit_by_bit(kind: str, precision: str) -> None:
    settings = Precision(precision, "cpu")
    for lean in (False, True):
        clip = small_clip(kind)
        if lean:
            make_lean(clip, choose_lean(clip))
        wanted = gradient(clip, None, settings)
        assert_equal(gradient(clip, halves_of(clip, settings), settings), wanted)


def test_gradients_are_the_same_where_activations_are_computed_again_and_captions_are_wrong() -> None:
    clip = small_clip("vit")
    make_lean(clip, choose_lean(clip))
    enable_checkpointing(clip)
    wanted = gradient(clip, None, full=True)
    assert_equal(gradient(clip, halves_of(clip), full=True), wanted)


def test_compiled_blocks_give_the_same_gradients_too() -> None:
    clip = small_clip("vit")
    make_lean(clip, choose_lean(clip))
    compilation = compile_towers(
        clip, Choice(subject="compile", value="on", reason="a test"), backend="aot_eager"
    )
    wanted = gradient(clip, None)
    graphs = compilation.graphs
    halves = halves_of(clip)
    assert_equal(gradient(clip, halves), wanted)
    more = compilation.graphs
    assert graphs < more <= 2 * graphs, "a graph of its own for each pass, once"
    assert_equal(gradient(clip, halves), wanted)
    assert (compilation.graphs, compilation.choice.value) == (more, "on")


def test_a_warm_up_among_the_stand_ins_compiles_all_that_the_step_needs() -> None:
    clip = small_clip("vit")
    make_lean(clip, choose_lean(clip))
    compilation = compile_towers(
        clip, Choice(subject="compile", value="on", reason="a test"), backend="eager"
    )
    halves = halves_of(clip)
    with halves.standing_in():
        compilation.warm_up(passes_of(clip, ROWS, PART, 16), BF16.autocast)
    graphs = compilation.graphs
    gradient(clip, halves)
    assert compilation.graphs == graphs > 0


def test_gradients_that_are_added_while_the_backward_pass_goes_on_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = small_clip("vit")
    wanted = gradient(clip, None)
    monkeypatch.setattr(half_weights, "_WAITING_BYTES", 1)
    assert_equal(gradient(clip, halves_of(clip)), wanted)


def test_frozen_weights_get_no_gradient_and_earlier_gradients_are_kept() -> None:
    clip = small_clip("vit")
    clip.model.get_submodule("visual").requires_grad_(False)
    clip.model.get_submodule("transformer.resblocks.0.attn").requires_grad_(False)
    for parameter in clip.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in gradients(clip).items()}

    def from_there(halves: HalfWeights | None) -> dict[str, Tensor]:
        for name, value in before.items():
            clip.model.get_parameter(name).grad = value.clone()
        return gradient(clip, halves)

    wanted = from_there(None)
    assert wanted.keys() - {"the loss"} == before.keys()
    assert_equal(from_there(halves_of(clip)), wanted)


class Launches(TorchDispatchMode):
    """Counts what is given to the device: views and allocations aside."""

    FREE = ("empty", "view", "detach", "t.", "transpose", "slice.", "select.", "expand", "alias", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def launched(clip: Clip, halves: HalfWeights | None) -> Counter[str]:
    with Launches() as launches:
        gradient(clip, halves)
    return launches.names


def test_casts_and_additions_are_launched_once_for_many_weights() -> None:
    clip = small_clip("vit")
    make_lean(clip, choose_lean(clip))
    before, after = launched(clip, None), launched(clip, halves_of(clip))
    weights = 4 * 12  # two blocks of each tower
    # Autocast casts 8 of 12 weights of each block in two contexts, and casts the gradients of three parts.
    saved = before["_to_copy.default"] - after["_to_copy.default"]
    assert saved >= 4 * 8 * (2 + 3)
    foreach = {name: count for name, count in after.items() if name.startswith("_foreach")}
    assert set(foreach) == {"_foreach_copy_.default", "_foreach_add_.List"}
    # One cast of weights; for each tower's part, one of its gradients and one addition.
    assert sum(foreach.values()) <= 1 + 2 * 5
    assert sum(before.values()) - sum(after.values()) >= weights * 4


def test_afterwards_the_model_is_as_before_and_nothing_of_it_is_kept() -> None:
    clip = small_clip("vit")
    parameters, modules = dict(clip.model.named_parameters()), dict(clip.model.named_modules())
    states = {name: set(vars(module)) for name, module in modules.items()}
    halves = halves_of(clip)
    gc.disable()
    try:
        with halves.standing_in():
            inside = dict(clip.model.named_parameters())
            cast = {name for name, value in inside.items() if value.dtype == torch.bfloat16}
            assert inside.keys() == parameters.keys()
            kept = [weakref.ref(inside[name]) for name in cast]
            assert clip.model.get_submodule("transformer").get_cast_dtype() == torch.float32  # type: ignore[operator]
            del inside
        assert kept
        assert not any(one() is not None for one in kept), "memory is free without a garbage collection"
    finally:
        gc.enable()
    assert all(
        ".resblocks." in name and (".attn." in name or ".mlp." in name) and ".ln_" not in name
        for name in cast
    )
    assert all(value is parameters[name] for name, value in clip.model.named_parameters())
    assert {name: set(vars(module)) for name, module in modules.items()} == states


def test_a_step_that_runs_out_of_memory_leaves_the_weights_in_their_place() -> None:
    clip = small_clip("vit")

    class OneTime(nn.Module):
        """Has too little memory in the third pass through the tower, a replay."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.passes = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            if self.passes == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            passed: Tensor = self.inner(x)
            return passed

    other = copy.copy(clip)
    other.model = copy.deepcopy(clip.model)
    clip.model.visual = OneTime(clip.model.get_submodule("visual"))
    results = []
    for one, fails in ((clip, True), (other, False)):
        optimizer = build_optimizer(one.model, learning_rate=1e-3, weight_decay=0.1)
        step = Step(
            one,
            Objective(),
            optimizer,
            BF16,
            clip_norm=1.0,
            micro_batch_size=PART,
            half_weights=halves_of(one),
        )
        if fails:
            with pytest.raises(StepOutOfMemoryError):
                step(small_batch(ROWS), 1e-3)
            assert all(value.grad is None for value in one.model.parameters())
        results.append(step(small_batch(ROWS), 1e-3))
        assert {value.dtype for value in one.model.parameters()} == {torch.float32}
    assert results[0] == results[1]


def test_stand_ins_take_no_more_memory_than_autocasts_own_casts() -> None:
    clip = small_clip("vit")

    def peak_bytes(halves: HalfWeights | None) -> int:
        with LiveBytes("cpu") as live:
            for weight in clip.model.parameters():
                live.adopt(weight)
            gradient(clip, halves)
        peak: int = live.peak
        return peak

    waiting = (
        3 * 2 * sum(value.numel() for name, value in clip.model.named_parameters() if ".resblocks." in name)
    )
    assert waiting < half_weights._WAITING_BYTES
    assert peak_bytes(halves_of(clip)) <= peak_bytes(None) + waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_cuda_gradients_are_those_of_autocast_without_a_wait_and_compiled_ones_as_near() -> None:
    settings = Precision("bf16", "cuda")
    clip = build(ModelSource(name="cliptune-test-vit"), device="cuda", seed=1)
    clip.model.train()
    make_lean(clip, choose_lean(clip))
    halves = halves_of(clip, settings)
    wanted = gradient(clip, None, settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with halves.standing_in():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(gradient(clip, halves, settings), wanted)
    compile_towers(clip, Choice(subject="compile", value="on", reason="a test"))
    compiled, found = gradient(clip, None, settings), gradient(clip, halves, settings)
    # The compiler may leave out a rounding between two operations: as far as it goes either way.
    largest = max(float(value.norm()) for value in wanted.values())
    for name, value in wanted.items():
        apart = float((compiled[name] - value).norm())
        assert float((found[name] - compiled[name]).norm()) <= 2 * apart + 1e-3 * largest, name


@pytest.mark.parametrize(
    ("kind", "precision", "device_type", "value", "reason"),
    [
        ("vit", "bf16", "cuda", "on", "once"),
        ("vit", "fp16", "cpu", "on", "once"),
        ("vit", "fp32", "cuda", "off", "fp32 casts no weights"),
        ("vit", "fp16", "mps", "off", "Apple"),
        ("dropout", "bf16", "cuda", "on", "once"),  # the text tower's
    ],
)
def test_the_choice_is_told_with_its_reason(
    kind: str, precision: str, device_type: str, value: str, reason: str
) -> None:
    choice = choose_half_weights(small_clip(kind), precision, device_type)
    assert (choice.subject, choice.value) == ("half_weights", value)
    assert reason in choice.reason


def test_blocks_with_anything_unknown_in_them_compute_as_ever() -> None:
    clip = small_clip("vit")

    class Adapted(nn.Linear):
        """Reads its weight otherwise."""

    for name, module in clip.model.named_modules():
        if name.endswith("c_fc"):
            module.__class__ = Adapted
    choice = choose_half_weights(clip, "bf16", "cuda")
    assert choice.value == "off"
    assert HalfWeights.of(clip, BF16, choice) is None
