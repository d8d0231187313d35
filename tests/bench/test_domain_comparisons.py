"""The benchmarks on domains' data sets: that their sides differ in what they compare, and in nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from open_clip_train.params import get_default_params, parse_args
from open_clip_train.scheduler import cosine_lr
from torch import nn
from torch.optim import AdamW

from bench import domains, temperature
from bench.domain_sets import DomainSet, lay_ready
from bench.trained import PLAIN, RECIPE, Judged, budget, interval, merged, plus_minus
from cliptune.domains import layered
from cliptune.spec import spec_from_mapping
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.data.dataset import read_dataset
from cliptune_trainer.data.loading.loader import Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.schedule import Schedule
from cliptune_trainer.spec import Spec, from_proto
from cliptune_trainer.steps.optim import BETAS, EPS

ROWS = 66
MODEL = "cliptune-tiny-vit"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> DomainSet:
    return lay_ready("elpv", Path(), tmp_path_factory.mktemp("sets"), rows=ROWS)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build(ModelSource(name=MODEL))


def specs_of(subject: DomainSet, seed: int = 1) -> dict[str, dict[str, Any]]:
    made = domains.works(subject, list(domains.ARMS), [seed], model=MODEL, device="cpu", epochs=2)
    return {work.arm: merged(subject.spec(), work.spec) for work in made}


def typed(spec: dict[str, Any]) -> Spec:
    return from_proto(layered(spec_from_mapping(spec)).spec)


def test_all_sides_see_the_same_rows_in_the_same_order_and_batches(cells: DomainSet, clip: Clip) -> None:
    seen = {}
    for arm, spec in specs_of(cells).items():
        side = typed(spec)
        rows = read_dataset(side.data, DataRoots(), seed=side.train.seed)
        assert side.train.batch_size is not None
        with Loader(
            rows.train,
            clip,
            batch_size=side.train.batch_size,
            seed=side.train.seed,
            augmentation=side.data.augment,
        ) as loader:
            steps = loader.steps_per_epoch * side.train.epochs
            batches = [
                (batch.image_ids_B.tolist(), batch.caption_ids_B.tolist(), batch.tokens_BL.tolist())
                for batch in loader.batches(0, steps)
            ]
        seen[arm] = (steps, [pair.reference for pair in rows.train.pairs], batches)
    assert seen[domains.PEER][0] == 2
    assert all(one == seen[domains.PEER] for one in seen.values())


def test_sides_differ_in_recipe_loss_rate_and_changes_to_images_alone(cells: DomainSet) -> None:
    found = specs_of(cells)
    for spec in found.values():
        spec.pop("domain", None)
        spec.pop("loss", None)
        spec["data"].pop("augment", None)
        for name in ("learning_rate", "warmup_fraction", "weight_decay", "schedule", "clip_norm"):
            spec["train"].pop(name, None)
    assert len({json.dumps(spec, sort_keys=True) for spec in found.values()}) == 1


def test_another_seed_is_another_order_for_all_sides_alike(cells: DomainSet) -> None:
    assert {typed(spec).train.seed for spec in specs_of(cells, seed=2).values()} == {2}


@pytest.mark.parametrize("steps", [95, 10_400])
def test_the_peer_has_the_rate_of_open_clips_own_schedule_at_each_step(steps: int) -> None:
    defaults = parse_args(["--model", "ViT-B-32"])
    optimizer = AdamW([nn.Parameter(nn.Linear(1, 1).weight)], lr=1.0)
    theirs = cosine_lr(optimizer, defaults.lr, defaults.warmup, steps)
    train = domains.open_clip(steps)["train"]
    ours = Schedule(shape=train["schedule"], total_steps=steps, warmup_fraction=train["warmup_fraction"])
    at = range(0, steps, max(steps // 50, 1))
    rates = [train["learning_rate"] * ours.share(step) for step in at]
    np.testing.assert_allclose(rates, [theirs(step) for step in at], rtol=1e-9)


def test_the_peer_has_open_clips_other_defaults() -> None:
    defaults = parse_args(["--model", "ViT-B-32"])
    train = domains.open_clip(95)["train"]
    assert train["weight_decay"] == defaults.wd
    assert train["schedule"] == defaults.lr_scheduler
    assert train["clip_norm"] == 0.0
    assert defaults.grad_clip_norm is None
    assert (defaults.beta1, defaults.beta2) == BETAS
    assert get_default_params("ViT-B-32")["eps"] == EPS
    assert budget(MODEL, "cpu", epochs=1, seed=0)["train"]["batch_size"] == defaults.batch_size


def test_a_set_keeps_test_rows_out_of_training_and_of_validation(cells: DomainSet) -> None:
    spec = typed(specs_of(cells)[domains.OURS])
    rows = read_dataset(spec.data, DataRoots(), seed=0)
    tested = {line.split(",")[0] for line in (cells.folder / "test.csv").read_text().splitlines()[1:]}
    used = {pair.reference for pair in (*rows.train.pairs, *rows.validation.pairs)}
    assert len(tested) == ROWS
    assert not tested & used


def judged(arm: str, seed: int, value: float, validation: float = 0.5) -> Judged:
    return Judged(
        arm=arm,
        seed=seed,
        subject="elpv",
        test={("label", prompts): {"zero_shot/average_precision": value} for prompts in (RECIPE, PLAIN)},
        validation=validation,
        logit_scale=30.0,
        steps=4,
        step_s=0.1,
        train_s=0.3,
    )


def test_sides_are_compared_seed_by_seed(cells: DomainSet) -> None:
    found = [judged(domains.OURS, 0, 0.50), judged(domains.OURS, 1, 0.70), judged(domains.PEER, 0, 0.40)]
    start = {("label", prompts): {"zero_shot/average_precision": 0.3} for prompts in (RECIPE, PLAIN)}
    lines = domains.lines_of(cells, start, found)
    assert [line["side"] for line in lines] == [domains.START, domains.OURS, domains.PEER]
    assert [line["seeds"] for line in lines] == [0, 2, 1]
    # Seed 1 has no pair yet.
    assert lines[1]["more than the peer"] == "10.0"
    assert str(lines[1]["recipe's prompts"]).startswith("60.0 ± ")


def test_the_grids_best_is_chosen_by_validation_as_a_user_would(cells: DomainSet) -> None:
    values = {6.25: (0.9, 0.1), 12.5: (0.6, 0.8), 25.0: (0.5, 0.2), 50.0: (0.4, 0.2), 100.0: (0.3, 0.2)}
    grid = [judged(temperature.fixed(scale), 0, *value) for scale, value in values.items()]
    lines = temperature.lines_of(cells, [*grid, judged(temperature.LEARNED, 0, 0.7)])
    by_name = {line["temperature"]: line for line in lines}
    assert by_name["best of five, by validation"]["test"] == "60.0"
    assert by_name["best of five, on test"]["test"] == "90.0"
    assert by_name["best of five, by validation"]["learned is more by"] == "10.0"


def test_an_interval_is_students() -> None:
    values = [0.61, 0.64, 0.72]
    mean, half = interval(values)
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-4)
    assert plus_minus([0.5]) == "50.0"
