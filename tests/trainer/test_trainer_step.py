from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cliptune_model.clip import Clip
from cliptune_trainer.data.loader import Batch
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.optim import (
    MAX_LOG_SCALE,
    build_optimizer,
    load_state_tensors,
    state_tensors,
    takes_decay,
)
from cliptune_trainer.precision import Precision
from cliptune_trainer.step import Step


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
    return Step(clip, LOSSES["infonce"], optimizer, settings, clip_norm=clip_norm), optimizer


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
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
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
    assert float(scale.detach()) <= MAX_LOG_SCALE


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
