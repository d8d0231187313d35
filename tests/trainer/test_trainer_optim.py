from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

from cliptune_model.clip import Clip
from cliptune_trainer.steps.optim import build_optimizer, set_learning_rate, takes_decay


def test_the_logit_scale_has_a_learning_rate_of_its_own_in_proportion_to_the_others(clip: Clip) -> None:
    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1, scale_share=0.25)
    matrices, vectors, scales = optimizer.param_groups
    assert scales["param_names"] == ["logit_scale"]
    assert [group["lr"] for group in (matrices, vectors, scales)] == [1e-3, 1e-3, 2.5e-4]
    set_learning_rate(optimizer, 2e-3)
    assert [group["lr"] for group in (matrices, vectors, scales)] == [2e-3, 2e-3, 5e-4]
    before = clip.logit_scale
    cast(torch.Tensor, clip.model.logit_scale).grad = torch.tensor(1.0)
    optimizer.step()
    # Adam's first step is the learning rate, whatever the gradient's size.
    assert clip.logit_scale / before == pytest.approx(1 - 5e-4, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "visual.trunk.pos_embed",
        "visual.trunk.reg_token",
        "text.transformer.embeddings.position_embeddings.weight",
        "visual.trunk.layers.0.blocks.1.attn.relative_position_bias_table",
        "visual.transformer.resblocks.0.attn.head_scale",
    ],
)
def test_positions_tokens_and_scales_of_other_libraries_towers_take_no_decay(name: str) -> None:
    assert not takes_decay(name, torch.zeros(4, 4))
    assert takes_decay("visual.trunk.blocks.0.mlp.fc1.weight", torch.zeros(4, 4))


def test_the_optimizer_is_fused_on_this_machine_and_takes_no_frozen_parameter(clip: Clip) -> None:
    cast(nn.Module, clip.model.visual).requires_grad_(False)
    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert all(group["fused"] for group in optimizer.param_groups)
    assert names
    assert not any(name.startswith("visual.") for name in names)
