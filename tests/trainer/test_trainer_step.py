from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.optim import (
    build_optimizer,
    load_state_tensors,
    state_tensors,
    takes_decay,
)
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step, StepOutOfMemoryError
from tests.trainer.towers import small_batch, small_clip


def batch(clip: Clip, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        epoch=0,
        index=0,
        images_B3HW=torch.randn(rows, 3, 32, 32, generator=generator),
        tokens_BL=clip.tokenize([f"tile {row}" for row in range(rows)]),
        image_ids_B=torch.arange(rows),
        caption_ids_B=torch.arange(rows),
    )


def make(clip: Clip, precision: str = "fp32", clip_norm: float = 1.0) -> tuple[Step, torch.optim.AdamW]:
    settings = Precision(precision, "cpu")
    optimizer = build_optimizer(
        clip.model, learning_rate=1e-3, weight_decay=0.1, scaled=settings.scaler is not None
    )
    clip.model.train()
    return Step(clip, Objective(), optimizer, settings, clip_norm=clip_norm), optimizer


def test_biases_norms_embeddings_and_the_logit_scale_take_no_decay(clip: Clip) -> None:
    decayed = {name for name, value in clip.model.named_parameters() if takes_decay(name, value)}
    assert "visual.conv1.weight" in decayed
    assert "token_embedding.weight" in decayed
    assert "visual.proj" in decayed
    for name in (
        "logit_scale",
        "positional_embedding",
        "visual.class_embedding",
        "visual.positional_embedding",
    ):
        assert name not in decayed
    assert not any(name.endswith("bias") or ".ln_" in name for name in decayed)
    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(clip.model.parameters()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_lowers_the_loss_with_fp32_weights_in_every_precision(clip: Clip, precision: str) -> None:
    step, _ = make(clip, precision)
    results = [step(batch(clip), 1e-3) for _ in range(12)]
    losses = [result.loss for result in results if not result.skipped]
    assert len(losses) > 6
    assert losses[-1] < losses[0]
    assert {value.dtype for value in clip.model.parameters()} == {torch.float32}


def test_the_gradient_norm_is_reported_before_clipping_and_the_learning_rate_is_the_one_given(
    clip: Clip,
) -> None:
    step, optimizer = make(clip, clip_norm=1e-4)
    result = step(batch(clip), 3e-5)
    assert result.gradient_norm > 1e-2
    assert {group["lr"] for group in optimizer.param_groups} == {3e-5}


def test_a_loss_that_is_not_finite_changes_no_weight(clip: Clip) -> None:
    step, _ = make(clip)
    step(batch(clip), 1e-3)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    poisoned = batch(clip)
    poisoned.images_B3HW[0, 0, 0, 0] = math.nan
    result = step(poisoned, 1e-3)
    assert result.skipped
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    assert not step(batch(clip), 1e-3).skipped


def test_the_logit_scale_stays_between_1_and_100(clip: Clip) -> None:
    scale = clip.model.logit_scale
    assert isinstance(scale, nn.Parameter)
    step, _ = make(clip)
    for start, wanted in ((6.0, 100.0), (-5.0, 1.0)):
        with torch.no_grad():
            scale.fill_(start)
        assert step(batch(clip), 1e-6).logit_scale == pytest.approx(wanted, rel=1e-5)
    assert float(scale.detach()) <= math.log(100.0)


def test_an_optimizers_state_goes_through_named_tensors_and_back(clip: Clip) -> None:
    step, optimizer = make(clip)
    step(batch(clip), 1e-3)
    saved = {name: value.clone() for name, value in state_tensors(optimizer).items()}
    assert "visual.conv1.weight/exp_avg" in saved
    fresh = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    load_state_tensors(fresh, saved)
    restored = state_tensors(fresh)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(value, restored[name]) for name, value in saved.items())


def run_out_of_memory(above: int) -> Callable[..., None]:
    """A hook for a tower: more than `above` rows at once meet the allocator's own refusal."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if len(inputs[0]) > above:
            torch.empty(1 << 60, dtype=torch.uint8)

    return hook


def everything(clip: Clip, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in clip.model.state_dict().items()}
    found |= {f"optimizer {name}": value.clone() for name, value in state_tensors(optimizer).items()}
    return found | {"random": torch.get_rng_state()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize(("tower", "precision"), [("visual", "fp32"), ("text", "fp16")])
def test_out_of_memory_leaves_no_trace_and_the_step_is_repeated_with_the_same_result(
    tower: str, precision: str
) -> None:
    # Batch normalisation, dropout: everything that a half-done step could leave behind.
    results, ends = [], []
    for halved in (False, True):
        clip, pairs = small_clip("timm-resnet"), small_batch(8)
        clip.model.visual.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.1))
        settings = Precision(precision, "cpu")
        if settings.scaler is not None:
            settings.scaler.load_state_dict({"scale": 64.0, "_growth_tracker": 7})
        optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
        step = Step(clip, Objective(), optimizer, settings, clip_norm=1.0, micro_batch_size=2)
        torch.manual_seed(3)
        step(pairs, 1e-3)
        if halved:
            before = everything(clip, optimizer)
            scale = settings.scaler.state_dict() if settings.scaler else None
            # The text tower comes last, when half of the step is done.
            failing = getattr(clip.model, tower).register_forward_hook(run_out_of_memory(above=2))
            step.micro_batch_size = 4
            with pytest.raises(StepOutOfMemoryError, match="can't allocate memory") as caught:
                step(pairs, 1e-3)
            assert caught.value.micro_batch_size == 4
            assert caught.value.__context__ is None, "the failed step's tensors are held by its traceback"
            assert differing(everything(clip, optimizer), before) == []
            assert all(parameter.grad is None for parameter in clip.model.parameters())
            assert (settings.scaler.state_dict() if settings.scaler else None) == scale
            step.micro_batch_size = 2
            results.append(step(pairs, 1e-3))
            failing.remove()
        else:
            results.append(step(pairs, 1e-3))
        ends.append(everything(clip, optimizer))
    assert results[0] == results[1]
    assert not results[0].skipped
    assert differing(*ends) == []


def test_out_of_memory_in_the_very_first_step_leaves_no_trace(clip: Clip) -> None:
    step, _ = make(clip)
    step.micro_batch_size = 6
    text = clip.model.ln_final
    assert isinstance(text, nn.Module)
    failing = text.register_forward_hook(run_out_of_memory(above=3))
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    with pytest.raises(StepOutOfMemoryError):
        step(batch(clip), 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    step.micro_batch_size = 3
    halved = step(batch(clip), 1e-3)
    failing.remove()
    fresh = build(ModelSource(name="cliptune-test-vit"), seed=1)
    whole, _ = make(fresh)
    assert whole(batch(fresh), 1e-3).loss == pytest.approx(halved.loss, rel=1e-5)
    for name, value in clip.model.state_dict().items():
        assert torch.allclose(value, fresh.model.state_dict()[name], atol=2e-6), name


def test_other_errors_of_a_step_stay_what_they_are(clip: Clip) -> None:
    step, _ = make(clip)
    wrong = batch(clip)
    with pytest.raises(RuntimeError, match="channels"):
        step(replace(wrong, images_B3HW=wrong.images_B3HW[:, :2]), 1e-3)


class HostReads(TorchDispatchMode):
    """Notes every operation by which the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_host_reads_nothing_until_the_outcome_is_asked_for(clip: Clip, precision: str) -> None:
    step, _ = make(clip, precision)
    pairs = batch(clip)
    with HostReads() as reads:
        for size in (None, 2):
            step.micro_batch_size = size
            flying = step.launch(pairs, 1e-3)
    assert reads.found == []
    assert flying.result().loss > 0
    assert flying.result() is flying.result()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_cuda_never_synchronises(precision: str) -> None:
    clip = build(ModelSource(name="cliptune-test-vit"), device="cuda", seed=1)
    settings = Precision(precision, "cuda")
    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    clip.model.train()
    step = Step(clip, Objective(), optimizer, settings, clip_norm=1.0)
    pairs = batch(clip)
    pairs = replace(
        pairs,
        **{
            name: getattr(pairs, name).cuda()
            for name in ("images_B3HW", "tokens_BL", "image_ids_B", "caption_ids_B")
        },
    )
    step(pairs, 1e-3)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        flying = []
        for size in (None, 2):
            step.micro_batch_size = size
            flying.append(step.launch(pairs, 1e-3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(one.result().loss > 0 for one in flying)


def test_outcomes_read_a_step_later_are_those_read_at_once(clip: Clip) -> None:
    at_once, later = [], []
    step, _ = make(clip)
    for seed in range(4):
        at_once.append(step(small_batch(6, seed=seed), 1e-3))
    fresh = build(ModelSource(name="cliptune-test-vit"), seed=1)
    step, _ = make(fresh)
    before = None
    for seed in range(4):
        flying = step.launch(small_batch(6, seed=seed), 1e-3)
        later += [before.result()] if before else []
        before = flying
    assert before is not None
    assert [*later, before.result()] == at_once


def test_an_unfused_optimizer_takes_the_same_step(clip: Clip) -> None:
    """As on Apple's GPU before torch 2.13, whose fused kernel does not obey."""
    pairs = batch(clip)
    step, _ = make(clip, "fp16", clip_norm=0.5)
    fused = [step(pairs, 1e-3) for _ in range(3)]
    fresh = build(ModelSource(name="cliptune-test-vit"), seed=1)
    settings = Precision("fp16", "cpu")
    optimizer = build_optimizer(fresh.model, learning_rate=1e-3, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["fused"] = False
    fresh.model.train()
    step = Step(fresh, Objective(), optimizer, settings, clip_norm=0.5)
    for one in fused:
        other = step(pairs, 1e-3)
        assert other.skipped == one.skipped
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)
    pairs.images_B3HW[0, 0, 0, 0] = math.nan
    before = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    assert step(pairs, 1e-3).skipped
    assert all(torch.equal(value, before[name]) for name, value in fresh.model.state_dict().items())


def test_a_skipped_step_keeps_running_statistics_free_of_nan() -> None:
    clip, pairs = small_clip("timm-resnet"), small_batch(6)
    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    step = Step(clip, Objective(), optimizer, Precision("fp32", "cpu"), clip_norm=1.0, micro_batch_size=3)
    step(pairs, 1e-3)
    before = everything(clip, optimizer)
    pairs.images_B3HW[4] = math.inf
    result = step(pairs, 1e-3)
    assert result.skipped
    assert result.culprit is not None
    assert differing(everything(clip, optimizer), before) == []
