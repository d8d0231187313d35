"""The guard over adapters: points between, the pull and the mean are those of the merged weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cliptune_model.adapters import base_state, load_adapted, merged_state
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of, read_manifest
from cliptune_model.source import ModelSource
from cliptune_trainer.guard.start import StartingWeights, changing, put_in
from cliptune_trainer.steps.trainable import make_trainable
from cliptune_trainer.training.checkpoint import checkpoints, load_state
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob
from tests.trainer.test_trainer_adapters import spec
from tests.trainer.test_trainer_guard import evaluations, task
from tests.trainer.towers import small_clip

GUARD = {"points": [0.3], "tolerance": 1.0, "probe": {"data": "agreement"}}
ADAPTERS = [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "rank": 4}]


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = build(ModelSource(name="cliptune-test-vit"), seed=5)
    folder = tmp_path_factory.mktemp("start") / "model"
    export_model(clip, folder, manifest_of(clip))
    return folder


def begun(folder: Path, kind: str, adapter: Mapping[str, Any]) -> tuple[Clip, StartingWeights]:
    clip, _ = make_trainable(small_clip(kind), spec(adapter=adapter))
    return clip, StartingWeights.keep(clip, folder / "start.safetensors")


@torch.no_grad()
def stir(clip: Clip) -> None:
    """As training would: every matrix of the adapter moves."""
    generator = torch.Generator().manual_seed(2)
    for weight in clip.model.parameters():
        if weight.requires_grad and weight.ndim:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)


def merged(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in merged_state(clip.model).items()}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_point_between_is_the_one_whose_merged_weights_lie_there(tmp_path: Path, kind: str) -> None:
    clip, first = begun(tmp_path, kind, ADAPTERS[0])
    base = merged(clip)
    stir(clip)
    trained, changed = merged(clip), {name: one.clone() for name, one in changing(clip).items()}
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    for share in (0.0, 0.3, 1.0):
        with put_in(clip, first.between(changed, share)):
            found = merged(clip)
        for name, one in found.items():
            wanted = torch.lerp(base[name].double(), trained[name].double(), share)
            torch.testing.assert_close(one.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_a_bottleneck_adds_its_share_at_a_point_between(tmp_path: Path) -> None:
    clip, first = begun(tmp_path, "vit", ADAPTERS[1])
    stir(clip)
    name, path = next((n, m) for n, m in clip.model.named_modules() if hasattr(m, "up_bias"))
    y = torch.randn(3, path.up.shape[0])
    whole = path(y, y) - y
    changed = {one: tensor.clone() for one, tensor in changing(clip).items()}
    with put_in(clip, first.between(changed, 0.3)):
        torch.testing.assert_close(path(y, y) - y, 0.3 * whole, msg=name)


def test_the_pull_draws_merged_weights_to_the_base_by_its_share(tmp_path: Path) -> None:
    clip, first = begun(tmp_path, "vit", ADAPTERS[0])
    base = merged(clip)
    stir(clip)
    before = merged(clip)
    first.pull(clip)(0.25)
    for name, one in merged(clip).items():
        wanted = before[name] if name.startswith("logit") else torch.lerp(before[name], base[name], 0.25)
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "bottleneck"])
def test_a_job_publishes_the_chosen_point_and_a_resumed_one_the_same_bits(
    make_job: MakeJob, start: Path, adapter: dict[str, Any], tmp_path: Path
) -> None:
    parts: dict[str, Any] = {
        "model": {"name": f"local-dir:{start}"},
        "train": {"epochs": 3, "batch_size": 16, "learning_rate": 2e-2},
        "evaluation": {
            "every_epochs": 0,
            "bootstrap_samples": 0,
            "main_metric": "retrieval/image_to_text_map",
        },
        "adapter": {**adapter, "dropout": 0.0},
        # As much as the point between loses, and less than the trained weights do.
        "guard": {**GUARD, "tolerance": 0.05, "ema_decay": 0.5, "l2_sp": 3.0},
    }
    whole = make_job("whole", **parts)
    curve = evaluations(task(whole))[-1].guard
    assert [point.share for point in curve.points] == pytest.approx([0.0, 0.3, 1.0])
    share = curve.points[curve.chosen].share
    assert read_manifest(whole.folder.export).guard["share"] == pytest.approx(share)
    assert share > 0
    base = load_exported(start)
    _check_published(whole, base, share, adapter["kind"])
    killed = whole.copied(tmp_path / "killed")
    # As if the attempt had died before it was written.
    shutil.rmtree(checkpoints(killed.folder.checkpoints)[0])
    shutil.rmtree(killed.folder.export)
    assert evaluations(task(killed, 2))[-1].guard == curve
    ours, theirs = _published(killed), _published(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def _published(job: TrainerJob) -> dict[str, Tensor]:
    return dict(load_exported(job.folder.export).model.state_dict())


def _check_published(job: TrainerJob, base: Clip, share: float, kind: str) -> None:
    """The chosen point of the running mean, and nothing but the adapter is another than the base's."""
    newest = checkpoints(job.folder.checkpoints)[0]
    mean = {
        name.removeprefix("guard/mean/"): tensor
        for name, tensor in load_state(newest).tensors.items()
        if name.startswith("guard/mean/")
    }
    first = StartingWeights.read(job.folder.starting_weights)
    assert first is not None
    clip = load_adapted(newest / "model")
    with put_in(clip, first.between(mean, share)):
        wanted = dict(clip.model.state_dict()) if kind == "bottleneck" else merged(clip)
        wanted = {name: tensor.clone() for name, tensor in wanted.items()}
    found = _published(job)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    if kind == "bottleneck":
        held, own = base_state(load_adapted(job.folder.export).model), base_state(base.model)
        assert all(torch.equal(held[name], tensor) for name, tensor in own.items())
