"""Image sizes over a training: what each step sees, that a resume repeats it, and the sweep at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transformer import PatchDropout
from PIL import Image
from timm.layers.drop import DropPath

from cliptune.errors import InvalidInputError, SpecError
from cliptune.evaluation import evaluation_from_message
from cliptune.evaluation_lines import evaluation_lines
from cliptune.spec import spec_from_mapping
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip, build
from cliptune_model.exported import read_manifest
from cliptune_model.source import ModelSource
from cliptune_trainer.data.loading.loader import Loader
from cliptune_trainer.evaluation.degrade import DEGRADATIONS
from cliptune_trainer.image.augment import Augmentation
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.resolution.schedule import SizeSchedule, Stage
from cliptune_trainer.resolution.settle import Settled, settle_sizes
from cliptune_trainer.spec import Spec, from_proto
from cliptune_trainer.steps.stochastic_depth import StochasticDepth
from cliptune_trainer.training.pace import Pace
from cliptune_trainer.training.run import run
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob
from tests.trainer.towers import small_batch, small_clip

PROGRESSIVE = {"schedule": "progressive", "sizes": [16, 24, 32]}
MULTI_SCALE = {"schedule": "multi_scale", "sizes": [16, 32, 48]}


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


def spec_of(resolution: dict[str, Any], **data: Any) -> Spec:
    mapping = {
        "name": "sizes",
        "model": {"name": "cliptune-test-vit"},
        "data": {"train": "tiles.csv", **data},
        "train": {"seed": 5, "resolution": resolution},
    }
    return from_proto(spec_from_mapping(mapping))


def settled(clip: Clip, resolution: dict[str, Any], steps: int = 100, **data: Any) -> Settled:
    return settle_sizes(spec_of(resolution, **data), clip, steps)


def sides(schedule: SizeSchedule, steps: int) -> list[int]:
    return [schedule.at(step).size[0] for step in range(steps)]


def prepared(job: TrainerJob) -> job_pb2.JobPlan:
    journal = Journal(job.folder.journal(0), 0)
    try:
        prepare(job.folder, [job.root], Reporter(journal))
    finally:
        journal.close()
    return next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))


def trained(job: TrainerJob, attempt: int = 1) -> None:
    journal = Journal(job.folder.journal(attempt), attempt)
    try:
        run(job.folder, [job.root], Reporter(journal), Inbox(), linked=False)
    finally:
        journal.close()


def seen(job: TrainerJob, attempt: int) -> dict[int, int]:
    """Step → side of its images."""
    return {
        event.event.progress.step: event.event.progress.image_size
        for event in job.journal(attempt)
        if event.event.HasField("progress")
    }


# -- schedules


def test_without_a_word_every_step_has_the_models_own_size_and_all_of_the_augmentation(clip: Clip) -> None:
    found = settled(clip, {}, augmentation="crop").schedule
    assert set(sides(found, 100)) == {32}
    assert {found.at(step).augmentation.crop_min_area for step in range(100)} == {0.6}
    assert not settled(clip, {}).choices


def test_progressive_sizes_rise_with_the_augmentation_and_end_in_a_brief_tail(clip: Clip) -> None:
    found = settled(clip, PROGRESSIVE, augment={"crop_min_area": 0.5, "flip_horizontal": True}).schedule
    assert sides(found, 100) == [16] * 62 + [24] * 28 + [32] * 10
    looks = [found.at(step) for step in (0, 62, 90)]
    assert [look.augmentation.crop_min_area for look in looks] == [0.75, 0.625, 0.5]
    assert [look.strength for look in looks] == [0.5, 0.75, 1.0]
    assert all(look.augmentation.flip_horizontal for look in looks)
    assert found.target == (32, 32)


def test_a_progressive_schedule_without_sizes_begins_at_half_the_models_own(clip: Clip) -> None:
    found = settled(clip, {"schedule": "progressive"}, steps=10).schedule
    assert sides(found, 10) == [16] * 6 + [24] * 3 + [32]


def test_it_sees_less_than_half_of_the_fixed_ones_pixels(clip: Clip) -> None:
    found = settled(clip, {"schedule": "progressive"}).schedule
    assert found.mean(lambda size: size[0] * size[1]) <= 32 * 32 / 2


def test_multi_scale_draws_every_steps_size_from_the_seed_and_the_step_alone(clip: Clip) -> None:
    first = settled(clip, MULTI_SCALE).schedule
    again = settled(build(ModelSource(name="cliptune-test-vit"), seed=9), MULTI_SCALE).schedule
    drawn = sides(first, 300)
    assert drawn == sides(again, 300)
    assert drawn[40:] == [first.at(step).size[0] for step in range(40, 300)]
    assert {side: drawn.count(side) > 60 for side in (16, 32, 48)} == {16: True, 32: True, 48: True}
    assert sides(replace(first, seed=6), 300) != drawn
    assert first.target == (32, 32)


def test_the_time_left_knows_the_sizes_of_the_steps_to_come() -> None:
    small, large = (16, 16), (32, 32)
    schedule = SizeSchedule(
        stages=(Stage(until=4, sizes=(small,)), Stage(until=8, sizes=(small, large))), target=large
    )
    ticks = iter([0.0, 1.0, 2.0, 3.0, 4.0, 14.0])
    pace = Pace(8, schedule, lambda: next(ticks))
    for step in (1, 2, 3, 4):
        pace.step_done(step)
    assert schedule.left(1) == {small: 3 + 2, large: 2}
    assert pace.eta_s(4) == pytest.approx(2 * 1 + 2 * 4)  # four times the pixels, none seen yet
    step = next(step for step in range(5, 9) if schedule.at(step - 1).size == large)
    pace.step_done(step)
    assert pace.eta_s(6) == pytest.approx(1 * 1 + 1 * 10)
    assert pace.eta_s(8) == 0


def test_the_fixres_finish_has_mild_crops_at_its_size(clip: Clip) -> None:
    wanted = {"finish_fraction": 0.25, "finish_size": 40}
    found = settled(clip, wanted, augment={"crop_min_area": 0.2}).schedule
    assert sides(found, 100) == [32] * 75 + [40] * 25
    assert found.at(99).augmentation.crop_min_area == pytest.approx(0.8)
    assert found.target == (40, 40)


def test_each_size_has_a_step_however_few_there_are(clip: Clip) -> None:
    assert sides(settled(clip, {**PROGRESSIVE, "tail_fraction": 1.0}, steps=3).schedule, 3) == [16, 24, 32]


def test_milder_changes_keep_flips_and_shrink_what_has_a_size() -> None:
    full = Augmentation(
        flip_horizontal=True, rotate_quarter=True, rotate_degrees=20, crop_min_area=0.6, hue=0.2
    )
    mild = full.scaled(0.5)
    assert (mild.flip_horizontal, mild.rotate_quarter) == (True, True)
    assert (mild.rotate_degrees, mild.crop_min_area, mild.hue) == (10, 0.8, 0.1)
    assert full.scaled(1) is full


def test_stochastic_depth_and_patch_dropout_follow_the_strength_and_return_to_their_own() -> None:
    dropping, patches = small_clip("dropout").model, small_clip("patch-dropout").model
    depth = StochasticDepth(dropping)

    def rates() -> list[float]:
        return [float(m.drop_prob) for m in dropping.modules() if isinstance(m, DropPath)]

    own = rates()
    depth.scale(0.5)
    assert rates() == [rate / 2 for rate in own]
    depth.scale(1.0)
    assert rates() == own
    assert max(own) > 0
    StochasticDepth(patches).scale(0.5)
    assert [m.prob for m in patches.modules() if isinstance(m, PatchDropout)] == [0.25]


# -- wrong schedules


@pytest.mark.parametrize(
    ("resolution", "path"),
    [
        ({"schedule": "progressive", "sizes": [32, 16]}, "train.resolution.sizes[1]"),
        ({"schedule": "progressive", "sizes": []}, "train.resolution.sizes"),
        ({"schedule": "progressive", "sizes": [32]}, "train.resolution.sizes"),
        ({"schedule": "multi_scale", "sizes": [16, 16]}, "train.resolution.sizes[1]"),
        ({"sizes": [16, 32]}, "train.resolution.sizes"),
        ({"sizes": [0]}, "train.resolution.sizes[0]"),
        ({"sizes": [5000]}, "train.resolution.sizes[0]"),
        ({"schedule": "growing"}, "train.resolution.schedule"),
        ({"tail_fraction": 1.5}, "train.resolution.tail_fraction"),
        ({"finish_size": 40}, "train.resolution.finish_size"),
    ],
)
def test_a_wrong_schedule_is_named_before_anything_is_sent(resolution: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as told:
        spec_of(resolution)
    assert told.value.metadata["path"] == path
    assert told.value.metadata["allowed"]


def test_a_size_that_is_no_multiple_of_the_patch_is_rounded_with_a_notice(clip: Clip) -> None:
    found = settled(clip, {"sizes": [50]})
    assert found.schedule.sizes == ((48, 48),)
    (remark,) = found.remarks
    assert remark.code == "resolution-rounded"
    assert "is 50: images are 48 pixels, a multiple of the patch (8)" in remark.message


def test_so_is_a_size_of_the_sweep(make_job: MakeJob) -> None:
    job = make_job(evaluation={"resolutions": [15, 32]})
    prepared(job)
    told = [event.event.notice.message for event in job.journal(0) if event.event.HasField("notice")]
    assert any("evaluation.resolutions[0] is 15: images are 16 pixels" in message for message in told)


def test_or_refused_where_exact_was_asked(clip: Clip) -> None:
    with pytest.raises(InvalidInputError, match="multiples of the patch, 8, such as 48 or 56"):
        settled(clip, {"sizes": [50], "exact": True})


@pytest.mark.parametrize(
    ("sizes", "told"), [([4, 32], "at least 8: one patch"), ([30, 33], "some are the same in multiples of 8")]
)
def test_sizes_that_the_model_cannot_take_or_tell_apart_are_refused(
    clip: Clip, sizes: list[int], told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        settled(clip, {"schedule": "progressive", "sizes": sizes})


def test_more_sizes_than_steps_are_refused(clip: Clip) -> None:
    with pytest.raises(SpecError, match="as there are steps, 2"):
        settled(clip, PROGRESSIVE, steps=2)


def test_images_that_cannot_fit_are_refused_in_preparation_with_a_size_that_would(make_job: MakeJob) -> None:
    job = make_job(
        train={"resolution": {"sizes": [2048]}, "micro_batch_size": 8}, resources={"memory_gib": 0.2}
    )
    with pytest.raises(InvalidInputError, match=r"What would fit: .*images of \d+ pixels"):
        prepared(job)


# -- batches and steps


def test_a_loader_gives_every_step_its_size_also_from_other_processes(tiles: Path, clip: Clip) -> None:
    from cliptune_trainer.data.dataset import read_dataset
    from cliptune_trainer.data.roots import DataRoots
    from cliptune_trainer.spec import DataConfig

    pairs = read_dataset(DataConfig(train=str(tiles / "tiles.csv")), DataRoots([tiles]), seed=1).train
    schedule = settled(clip, MULTI_SCALE, steps=12, augmentation="crop").schedule
    batches = []
    for workers in (0, 1):
        with Loader(pairs, clip, batch_size=8, seed=1, sizes=schedule, workers=workers) as loader:
            batches.append([batch.images_B3HW.to("cpu") for batch in loader.batches(0, 12)])
    threads, processes = batches
    assert [images.shape[-1] for images in threads] == sides(schedule, 12)
    assert all(map(torch.equal, threads, processes))
    with Loader(pairs, clip, batch_size=8, seed=1, sizes=schedule) as loader:
        later = [batch.images_B3HW.to("cpu") for batch in loader.batches(5, 12)]
    assert all(map(torch.equal, threads[5:], later))


def test_the_plan_has_a_micro_batch_for_every_size_and_one_contrastive_batch(make_job: MakeJob) -> None:
    job = make_job(
        train={"resolution": {"schedule": "progressive", "sizes": [32, 256]}, "batch_size": 32, "epochs": 2},
        resources={"memory_gib": 0.2},
    )
    plan = prepared(job)
    chosen = {decision.subject: decision.choice for decision in plan.decisions}
    assert plan.batch_size == 32
    assert plan.micro_batch_size < 32
    assert chosen["micro_batch_size at 32"] == "32"
    assert "32 for 1 steps; 256 for 1 steps" in chosen["image_size"]


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_a_gradient_at_any_size_is_the_same_in_parts_as_at_once(kind: str) -> None:
    from cliptune_trainer.losses.objective import Objective
    from cliptune_trainer.steps.accumulation import accumulate
    from cliptune_trainer.steps.precision import Precision

    clip = small_clip(kind)
    clip.model.double()
    clip.similarity.double()
    batch = replace(small_batch(6), images_B3HW=torch.randn(6, 3, 64, 96, dtype=torch.float64))
    gradients = []
    for size in (6, 2):
        clip.model.zero_grad()
        accumulate(clip, Objective(), Precision("fp32", "cpu"), batch, size)
        gradients.append([p.grad.clone() for p in clip.model.parameters() if p.grad is not None])
    assert max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) <= 1e-6


# -- whole jobs


@pytest.mark.parametrize(
    ("resolution", "stop"), [(PROGRESSIVE, 4), (PROGRESSIVE, 10), (MULTI_SCALE, 8)], ids=str
)
def test_a_run_that_goes_on_inside_any_stage_repeats_the_whole_one_bit_by_bit(
    make_job: MakeJob, resolution: dict[str, Any], stop: int
) -> None:
    train = {"resolution": resolution, "epochs": 2, "batch_size": 8}
    whole, broken = (
        make_job(
            name,
            train=train,
            checkpoint={"every_steps": 2, "keep": 10},
            evaluation={"bootstrap_samples": 0, "every_epochs": 0, "degradations": False},
        )
        for name in ("whole", "broken")
    )
    for job in (whole, broken):
        trained(job)
    for folder in broken.folder.checkpoints.iterdir():
        if int(folder.name.removeprefix("step-")) > stop:
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            folder.rmdir()
    trained(broken, attempt=2)
    expected = {step: told for step, told in whole.losses(1).items() if step > stop}
    assert broken.losses(2) == expected
    assert seen(broken, 2) == {step: side for step, side in seen(whole, 1).items() if step > stop}
    weights = "export/open_clip_model.safetensors"
    assert (broken.path / weights).read_bytes() == (whole.path / weights).read_bytes()


def test_a_job_ends_with_a_sweep_that_is_told_drawn_and_in_the_manifest(make_job: MakeJob) -> None:
    job = make_job(
        train={"resolution": PROGRESSIVE, "epochs": 2, "batch_size": 8},
        evaluation={"resolutions": [16, 48], "latency_budget_ms": 1000.0, "bootstrap_samples": 0},
        data={"validation_fraction": 0.3},
    )
    trained(job)
    told = [event.event.evaluation for event in job.journal(1) if event.event.HasField("evaluation")]
    assert [evaluation.HasField("sweep") for evaluation in told] == [False] * (len(told) - 1) + [True]
    evaluation = evaluation_from_message(told[-1])
    sweep = evaluation.sweep
    assert sweep is not None
    assert [size.told for size in sweep.sizes] == ["16", "32", "48"]
    assert sweep.sizes[1].metrics == evaluation.metrics
    assert set(sweep.degradations) == set(DEGRADATIONS)
    assert sweep.best is not None
    assert sweep.worst is not None
    values = [sweep.value(size) for size in sweep.sizes]
    assert sweep.area_under_curve == pytest.approx((values[0] + 2 * values[1] + values[2]) / 4)
    assert all(size.images_per_second > 0 and size.latency_ms > 0 for size in sweep.sizes)
    memory = [size.memory_bytes for size in sweep.sizes]
    assert memory == sorted(memory)
    picture = next(path for path in evaluation.pictures if "resolutions" in path)
    with Image.open(job.path / picture) as drawn:
        assert drawn.width > 300
    stored = json.loads((job.path / "resolutions.json").read_text())
    assert stored["best_size"] == sweep.best.told
    lines = "\n".join(evaluation_lines(evaluation))
    assert "IMAGES/S" in lines
    assert "mean over sizes" in lines
    manifest = read_manifest(job.folder.export)
    assert [proven.height for proven in manifest.proven_sizes] == [16, 32, 48]
    assert manifest.image_size == (32, 32)
    assert manifest.serving_size is None


def test_a_model_that_is_trained_at_another_size_is_evaluated_and_served_there(make_job: MakeJob) -> None:
    job = make_job(train={"resolution": {"sizes": [48]}, "epochs": 1, "batch_size": 8})
    trained(job)
    assert set(seen(job, 1).values()) == {48}
    assert read_manifest(job.folder.export).serving_size == (48, 48)


def test_degraded_images_keep_their_size_and_lose_their_detail() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    for name, degrade in DEGRADATIONS.items():
        found = degrade(noise)
        assert found.shape == noise.shape, name
        assert found.dtype == np.uint8
        assert found.std() < 0.7 * noise.std(), name


def test_a_stage_without_steps_is_left_out() -> None:
    schedule = SizeSchedule(
        stages=(Stage(until=2, sizes=((8, 8),)), Stage(until=4, sizes=((16, 16),))), target=(16, 16)
    )
    assert [schedule.at(step).size for step in (0, 1, 2, 3, 9)] == [(8, 8)] * 2 + [(16, 16)] * 3
    assert schedule.sizes == ((8, 8), (16, 16))
