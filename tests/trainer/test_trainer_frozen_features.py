"""Features of frozen towers are computed once, and gradients, losses and resumed runs are as without that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cliptune_model.exported import load_exported
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.forms.reader import read_table
from cliptune_trainer.data.loading.loader import Batch, Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.image.augment import NONE, Augmentation
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.resolution.schedule import SizeSchedule
from cliptune_trainer.spec import DataConfig
from cliptune_trainer.steps import frozen_features
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.batch_norm import BatchNorms
from cliptune_trainer.steps.frozen_features import FrozenPlan, know, plan_frozen
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.trainable import make_trainable
from cliptune_trainer.training.checkpoint import checkpoints
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob
from tests.trainer.test_trainer_adapters import spec
from tests.trainer.test_trainer_guard import task
from tests.trainer.towers import gradients, small_clip

FP32 = Precision("fp32", torch.device("cpu"))
BOTH = FrozenPlan(images=True, texts=True, choices=())


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def pairs(tiles: Path) -> Pairs:
    """Twenty of the tiles; every other one draws its caption."""
    table = read_table(str(tiles / "tiles.csv"), DataConfig(train="tiles.csv"), DataRoots([tiles]))
    return Pairs(
        [
            replace(pair, variants=(pair.caption, f"{pair.caption}, again")) if pair.row % 2 else pair
            for pair in table.pairs[:20]
        ]
    )


def batches(clip: Any, pairs: Pairs, plan: FrozenPlan, steps: int) -> list[Batch]:
    known = know(clip, pairs, plan, FP32, size=clip.image_size, exact=True, rows=7, check=lambda: False)
    with Loader(pairs, clip, batch_size=8, seed=1, known=known) as loader:
        return list(loader.batches(0, steps))


def without_features(batch: Batch) -> Batch:
    return replace(batch, image_features_BD=None, text_features_BD=None)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", ["vit", "dropout", "timm-resnet", "siglip"])
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_gradients_and_loss_are_those_of_towers_that_compute_each_time(
    pairs: Pairs, kind: str, tower: str, micro_batch: int
) -> None:
    clip, _ = make_trainable(small_clip(kind), spec(train={"freeze": {tower: True}}))
    clip.model.train()
    BatchNorms(clip.model).prepare()
    plan = replace(BOTH, images=tower == "image", texts=tower == "text")
    for batch in batches(clip, pairs, plan, 4):
        held = batch.image_features_BD if tower == "image" else batch.text_features_BD
        assert held is not None
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        for one in (batch, without_features(batch)):
            torch.manual_seed(3)
            loss = accumulate(clip, Objective(LossConfig()), FP32, one, micro_batch)
            found.append((loss, gradients(clip)))
        (loss, ours), (wanted_loss, wanted) = found
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
        assert ours.keys() == wanted.keys()
        size = max(float(one.abs().max()) for one in wanted.values())
        for name, gradient in wanted.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6 * size, msg=name)


def test_the_same_table_comes_of_the_same_rows_bit_by_bit(pairs: Pairs) -> None:
    clip = small_clip("vit")
    first, again = (batches(clip, pairs, BOTH, 5) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.image_features_BD is not None
        assert one.text_features_BD is not None
        assert torch.equal(one.image_features_BD, other.image_features_BD)  # type: ignore[arg-type]
        assert torch.equal(one.text_features_BD, other.text_features_BD)  # type: ignore[arg-type]
    assert clip.model.training


def test_a_table_is_made_where_it_pays_and_the_plan_says_why_not(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = small_clip("vit")
    still = SizeSchedule.fixed((32, 32), NONE, 100)

    def told(tower: str, sizes: SizeSchedule = still, rows_seen: int = 800) -> str:
        asked = spec(train={"freeze": {tower: True}})
        plan = plan_frozen(asked, pairs, clip, sizes, rows_seen=rows_seen)
        (choice,) = plan.choices
        assert (choice.value == "computed once") is (plan.images if tower == "image" else plan.texts)
        return f"{choice.value}: {choice.reason}"

    assert "computed once" in told("image")
    assert "20 of them" in told("image")
    changed = SizeSchedule.fixed((32, 32), Augmentation(flip_horizontal=True), 100)
    assert "images are changed from step to step" in told("image", changed)
    assert told("text", changed) == told("text")
    assert "computed once" in told("text")
    assert "no image is seen twice" in told("image", rows_seen=16)
    monkeypatch.setattr(frozen_features, "LIMIT_BYTES", 1000)
    assert "more than" in told("image")
    assert plan_frozen(spec(), pairs, clip, still, rows_seen=800).choices == ()


# -- a job


def job_of(make_job: MakeJob, name: str, tower: str) -> TrainerJob:
    return make_job(
        name,
        train={"epochs": 2, "batch_size": 16, "freeze": {tower: True}},
        data={"augmentation": "none"},
        checkpoint={"every_steps": 2},
        evaluation={"every_epochs": 0, "bootstrap_samples": 0},
    )


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_job_looks_them_up_learns_the_same_and_a_resumed_one_the_same_bits(
    make_job: MakeJob, tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(make_job, "known", tower)
    (plan,) = [event.event.plan for event in task(job, 0) if event.event.HasField("plan")]
    told = {entry.subject: entry.choice for entry in plan.decisions}
    assert told[f"{tower} features"] == "computed once"
    task(job)
    killed = job.copied(tmp_path / "killed")
    # As if the attempt had died before it was written.
    shutil.rmtree(checkpoints(killed.folder.checkpoints)[0])
    shutil.rmtree(killed.folder.export)
    task(killed, 2)
    whole, resumed = (load_exported(one.folder.export).model.state_dict() for one in (job, killed))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    monkeypatch.setattr(frozen_features, "LIMIT_BYTES", 0)
    plain = job_of(make_job, "anew", tower)
    task(plain)
    wanted = plain.losses(1)
    assert job.losses(1).keys() == wanted.keys()
    for step, values in job.losses(1).items():
        assert values == pytest.approx(wanted[step], rel=1e-4), step
