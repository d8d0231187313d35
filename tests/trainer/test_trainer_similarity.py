"""Training with every similarity: gradients in parts and in tiles, what it learns, going on after a kill."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.similarity import SIMILARITIES, similarity_for
from cliptune_model.source import ModelSource
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.optim import build_optimizer, load_state_tensors, state_tensors
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step
from tests.trainer.towers import distance, gradients, small_batch, small_clip

LEARNED = ["mahalanobis", "lorentz"]
ROWS = 7


@pytest.fixture(scope="module")
def towers() -> Clip:
    """Shared: not to be changed."""
    return small_clip("vit")


def compared_by(towers: Clip, name: str) -> Clip:
    """A copy with another similarity."""
    model = copy.deepcopy(towers.model)
    return replace(towers, model=model, similarity=similarity_for(name, towers.embedding_dim))


def exact(towers: Clip, name: str) -> Clip:
    """In fp64: near pairs have steep slopes, which would raise the rounding of towers in fp32."""
    clip = compared_by(towers, name)
    clip.model.double()
    return clip


def all_gradients(clip: Clip, size: int, *, block: int | None = None) -> dict[str, Tensor]:
    batch = small_batch(ROWS, dtype=torch.float64)
    accumulate(clip, Objective(block=block), Precision("fp32", "cpu"), batch, size)
    found = {
        f"similarity.{name}": one.grad
        for name, one in clip.similarity.named_parameters()
        if one.grad is not None
    }
    clip.similarity.zero_grad(set_to_none=True)
    return gradients(clip) | found


def trained(clip: Clip) -> Step:
    objective = Objective()
    optimizer = build_optimizer(
        clip.model,
        learning_rate=1e-3,
        weight_decay=0.1,
        beside={"similarity": clip.similarity, "loss": objective},
    )
    return Step(clip, objective, optimizer, Precision("fp32", "cpu"), clip_norm=1.0)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_batch_in_parts_has_the_gradient_of_the_whole_with_every_similarity(
    towers: Clip, name: str
) -> None:
    clip = exact(towers, name)
    wanted = all_gradients(clip, ROWS)
    assert any(key.startswith("similarity.") for key in wanted) == (name in LEARNED)
    for size in (1, 3):
        assert distance(all_gradients(clip, size), wanted) <= 1e-6


@pytest.mark.parametrize("name", [name for name, kind in SIMILARITIES.items() if kind.linear])
def test_tiles_have_the_gradient_of_the_whole_table_with_every_linear_similarity(
    towers: Clip, name: str
) -> None:
    clip = exact(towers, name)
    assert distance(all_gradients(clip, ROWS, block=3), all_gradients(clip, ROWS)) <= 1e-5


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_model_learns_with_every_similarity_which_learns_too(towers: Clip, name: str) -> None:
    clip, batch = compared_by(towers, name), small_batch(4)
    start = {key: one.detach().clone() for key, one in clip.similarity.named_parameters()}
    step = trained(clip)
    losses = [step(batch, 3e-3).loss for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    for key, one in clip.similarity.named_parameters():
        assert not torch.equal(one, start[key]), key


@pytest.mark.parametrize("name", LEARNED)
def test_training_goes_on_to_the_bit_from_what_a_checkpoint_keeps_of_a_similarity(
    name: str, tmp_path: Path
) -> None:
    clip = build(ModelSource(name="cliptune-test-vit", similarity=name), seed=1)
    batch = replace(small_batch(6), tokens_BL=clip.tokenize([f"text {row}" for row in range(6)]))
    clip.model.train()
    step = trained(clip)
    for _ in range(2):
        step(batch, 1e-3)
    export_model(clip, tmp_path / "model", manifest_of(clip))
    moments = {key: value.clone() for key, value in state_tensors(step._optimizer).items()}
    assert any(key.startswith("similarity.") for key in moments)

    again = build(ModelSource(name=f"local-dir:{tmp_path / 'model'}"))
    again.model.train()
    resumed = trained(again)
    load_state_tensors(resumed._optimizer, moments)
    assert [resumed(batch, 1e-3).loss for _ in range(2)] == [step(batch, 1e-3).loss for _ in range(2)]
