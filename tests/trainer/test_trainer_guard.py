"""The forgetting guard: what is measured beside the domain, which weights are published, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cliptune.errors import CliptuneError, DataError, MissingColumnError, PathOutsideRootsError, SpecError
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of, read_manifest
from cliptune_model.source import ModelSource
from cliptune_trainer.data.table import Pair
from cliptune_trainer.guard.agreement import AGREEMENT, AgreementProbe, correlation
from cliptune_trainer.guard.curve import Point, choose
from cliptune_trainer.guard.drawings import drawings
from cliptune_trainer.guard.mean import RunningMean
from cliptune_trainer.guard.measure import decide_guard
from cliptune_trainer.guard.probe import sampled
from cliptune_trainer.guard.start import StartingWeights, changing, put_in
from cliptune_trainer.guard.words import everyday_texts
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.steps.optim import takes_decay
from cliptune_trainer.training.checkpoint import checkpoints, load_state
from cliptune_trainer.training.run import run
from tests.trainer.conftest import MakeJob, job_on
from tests.trainer.jobs import TrainerJob

SHORT = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
BRIEF = {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3}
# What random weights know of the embedded pictures is nothing: they need not be asked.
AGREED = {"probe": {"data": "agreement"}}
TWO = "image,caption\n0.png,one\n1.png,two\n"
LEAN = {"every_epochs": 0, "bootstrap_samples": 20}


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to start from: random weights that count as pretrained, as they come from a file."""
    clip = build(ModelSource(name="cliptune-test-vit"), seed=5)
    folder = tmp_path_factory.mktemp("start") / "model"
    export_model(clip, folder, manifest_of(clip))
    return folder


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """Twelve general pictures with texts and labels."""
    folder = tmp_path / "general"
    folder.mkdir()
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "kind"])
        for row, picture in enumerate(drawings()[:12]):
            picture.resize((48, 48)).save(folder / f"{row}.png")
            writer.writerow([f"{row}.png", f"a drawing, number {row}", ["shape", "other"][row % 2]])
    return folder


def task(job: TrainerJob, attempt: int = 1, roots: tuple[Path, ...] = ()) -> list[trainer_pb2.TrainerEvent]:
    """Trains (from 1) or prepares (0) in this process, and returns what was told."""
    journal = Journal(job.folder.journal(attempt), attempt)
    try:
        if attempt:
            run(job.folder, roots, Reporter(journal), Inbox(), linked=False)
        else:
            prepare(job.folder, roots, Reporter(journal))
    finally:
        journal.close()
    return job.journal(attempt)


def evaluations(events: list[trainer_pb2.TrainerEvent]) -> list[job_pb2.Evaluation]:
    return [event.event.evaluation for event in events if event.event.HasField("evaluation")]


def weights(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in changing(clip).items()}


def tuned(job: TrainerJob) -> dict[str, Tensor]:
    """The last checkpoint's weights: what was trained, whatever was published."""
    return weights(load_exported(checkpoints(job.folder.checkpoints)[0] / "model"))


def published(job: TrainerJob) -> dict[str, Tensor]:
    return weights(load_exported(job.folder.export))


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


# -- a guarded job


@pytest.fixture(scope="module")
def guarded(tiles: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainerJob:
    """A job that has ended, with all that a guard has: not to be changed."""
    job = job_on(
        tiles,
        tmp_path_factory.mktemp("guarded"),
        model={"name": f"local-dir:{start}"},
        train=SHORT,
        evaluation=LEAN,
        guard={**AGREED, "points": [0.25, 0.5], "tolerance": 1.0, "ema_decay": 0.9, "l2_sp": 5.0},
    )
    task(job)
    torch.use_deterministic_algorithms(False)
    return job


def mean_of(job: TrainerJob) -> dict[str, Tensor]:
    """The running mean, from the last checkpoint."""
    tensors = load_state(checkpoints(job.folder.checkpoints)[0]).tensors
    return {
        name.removeprefix("guard/mean/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("guard/mean/")
    }


def first_weights(job: TrainerJob) -> StartingWeights:
    first = StartingWeights.read(job.folder.starting_weights)
    assert first is not None
    return first


def test_a_pretrained_model_is_guarded_unless_asked_otherwise_and_random_weights_are_not(
    make_job: MakeJob, start: Path
) -> None:
    model = {"name": f"local-dir:{start}"}
    job = make_job("on", model=model, guard=AGREED)
    (plan,) = [event.event.plan for event in task(job, 0) if event.event.HasField("plan")]
    on = {entry.subject: entry for entry in plan.decisions}["guard"]
    assert on.choice == "on"
    assert "agreement" in on.reason

    def off(job: TrainerJob) -> str:
        spec = job.folder.spec()
        choice = decide_guard(spec, build(spec.model))
        assert choice.value == "off"
        return choice.reason

    assert off(make_job("off", model=model, guard={"off": True})) == "asked for"
    assert "random weights" in off(make_job("random"))
    assert "published" in off(make_job("skip", model=model, publish={"skip": True}))


def test_the_published_model_is_the_chosen_point_and_its_manifest_says_which(
    guarded: TrainerJob, start: Path
) -> None:
    before, after = evaluations(guarded.journal(1))
    assert before.general.main_metric == AGREEMENT
    assert before.general.metrics[AGREEMENT] == pytest.approx(1.0)
    assert before.general.loss == 0.0
    assert not before.HasField("guard")
    curve = after.guard
    assert [point.share for point in curve.points] == [0.0, 0.25, 0.5, 1.0]
    assert curve.points[0].domain_gain == curve.points[0].general_loss == 0.0
    assert curve.points[0].domain == pytest.approx(before.metrics[before.main_metric])
    losses = [point.general_loss for point in curve.points]
    assert losses == sorted(losses), "the further from the start, the more is forgotten"
    chosen = curve.points[curve.chosen]
    assert chosen.domain == max(point.domain for point in curve.points)
    assert after.metrics[after.main_metric] == pytest.approx(chosen.domain)
    assert after.general.loss == pytest.approx(chosen.general_loss)
    record = read_manifest(guarded.folder.export).guard
    assert record["share"] == chosen.share
    assert record["general_loss"] == pytest.approx(chosen.general_loss)
    assert guarded.notices(1)["guard-chose"] == curve.reason
    first = first_weights(guarded)
    assert close(first.whole(), weights(load_exported(start)))
    assert close(published(guarded), first.between(mean_of(guarded), chosen.share))
    with Image.open(guarded.path / curve.picture) as drawn:
        assert drawn.format == "PNG"
        assert np.asarray(drawn.convert("L")).std() > 10


def test_a_mean_of_the_weights_is_what_is_measured_and_published(guarded: TrainerJob) -> None:
    curve = evaluations(guarded.journal(1))[-1].guard
    assert curve.ema_decay == 0.9
    mean, last, share = mean_of(guarded), tuned(guarded), curve.points[curve.chosen].share
    assert share > 0
    assert not close(mean, last)
    first = first_weights(guarded)
    assert close(published(guarded), first.between(mean, share))
    assert not close(published(guarded), first.between(last, share))


def test_a_run_that_was_killed_and_resumed_publishes_the_same_bits(
    guarded: TrainerJob, tmp_path: Path
) -> None:
    killed = guarded.copied(tmp_path / "killed")
    shutil.rmtree(
        checkpoints(killed.folder.checkpoints)[0]
    )  # as if the attempt had died before it was written
    shutil.rmtree(killed.folder.export)
    again = evaluations(task(killed, 2))[-1].guard
    assert again == evaluations(guarded.journal(1))[-1].guard
    ours, theirs = published(killed), published(guarded)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_lost_starting_weights_are_told_and_the_last_weights_published(
    guarded: TrainerJob, tmp_path: Path
) -> None:
    job = guarded.copied(tmp_path / "lost")
    job.folder.starting_weights.write_bytes(b"damaged")
    shutil.rmtree(checkpoints(job.folder.checkpoints)[0])
    task(job, 2)
    assert "is gone or damaged" in job.notices(2)["guard-lost"]
    assert close(published(job), tuned(job))


def test_a_tolerance_of_nothing_publishes_the_starting_weights_and_warns(
    make_job: MakeJob, start: Path
) -> None:
    guard = {**AGREED, "points": [0.5], "tolerance": 0.0}
    job = make_job(model={"name": f"local-dir:{start}"}, train=BRIEF, evaluation=LEAN, guard=guard)
    after = evaluations(task(job))[-1]
    assert after.guard.chosen == 0
    assert "every other point loses more" in after.guard.reason
    assert close(published(job), weights(load_exported(start)))
    (notice,) = [event.event.notice for event in job.journal(1) if event.event.notice.code == "guard-chose"]
    assert notice.severity == job_pb2.SEVERITY_WARNING


def test_without_a_guard_the_last_weights_are_published_and_nothing_general_is_told(
    make_job: MakeJob, start: Path
) -> None:
    job = make_job(model={"name": f"local-dir:{start}"}, train=BRIEF, evaluation=LEAN, guard={"off": True})
    after = evaluations(task(job))[-1]
    assert not after.HasField("general")
    assert not after.HasField("guard")
    assert close(published(job), tuned(job))
    assert read_manifest(job.folder.export).guard == {}
    assert not job.folder.starting_weights.exists()


def test_weights_are_drawn_to_where_they_started_by_the_strength_times_the_learning_rate(
    make_job: MakeJob, start: Path
) -> None:
    """As strong as can be, each step goes all the way back."""
    train = {**BRIEF, "learning_rate": 2e-3, "schedule": "constant", "warmup_fraction": 0.0}
    guard = {**AGREED, "points": [0.5], "l2_sp": 1000.0}
    job = make_job(model={"name": f"local-dir:{start}"}, train=train, evaluation=LEAN, guard=guard)
    task(job)
    first, trained = weights(load_exported(start)), tuned(job)
    drawn = {name for name, tensor in first.items() if takes_decay(name, tensor)}
    assert drawn
    assert all(torch.equal(trained[name], first[name]) for name in drawn)
    assert not close({name: trained[name] for name in first.keys() - drawn}, first)


# -- a probe of one's own


def test_a_general_probe_is_measured_beside_the_domain_at_each_evaluation(
    make_job: MakeJob, start: Path, general: Path
) -> None:
    guard = {"points": [0.5], "probe": {"data": str(general / "pairs.csv"), "label_column": "kind"}}
    job = make_job(
        model={"name": f"local-dir:{start}"},
        train={**BRIEF, "epochs": 2},
        evaluation={"bootstrap_samples": 20},
        guard=guard,
    )
    told = evaluations(task(job))
    assert [entry.occasion for entry in told] == ["before", "during", "after"]
    assert all(entry.general.main_metric == "zero_shot/balanced_accuracy" for entry in told)
    assert all(entry.general.samples == 12 for entry in told)
    assert "retrieval/image_to_text_recall@1" in told[-1].general.metrics
    assert told[-1].general.interval.low <= told[-1].general.metrics["zero_shot/balanced_accuracy"]
    assert told[-1].guard.tolerance == 0.01
    assert not told[0].general.HasField("interval")


@pytest.mark.parametrize(
    ("content", "probe", "error", "told"),
    [
        ("image,caption\n", {}, DataError, "has no rows"),
        ("image,caption\nnone.png,a\ngone.png,b\n", {}, DataError, "guard.probe.data"),
        ("image,caption\n0.png,one\n", {}, DataError, "1 images with 1 different texts"),
        ("picture,caption\n0.png,one\n1.png,two\n", {}, MissingColumnError, "guard.probe.data"),
        (
            "image,caption\n0.png,one\n1.png,two\n",
            {"main_metric": "zero_shot/auroc"},
            SpecError,
            "retrieval/",
        ),
        (None, {}, DataError, "guard.probe.data"),
    ],
    ids=["no rows", "no images", "one pair", "no column", "a metric without labels", "no file"],
)
def test_a_probe_without_data_is_refused_before_the_job_waits_for_a_device(
    make_job: MakeJob,
    start: Path,
    general: Path,
    content: str | None,
    probe: dict[str, Any],
    error: type[CliptuneError],
    told: str,
) -> None:
    file = general / "bad.csv"
    if content is not None:
        file.write_text(content)
    guard = {"probe": {"data": str(file), **probe}}
    job = make_job(model={"name": f"local-dir:{start}"}, guard=guard)
    with pytest.raises(error) as caught:
        task(job, 0)
    assert told in caught.value.message + caught.value.metadata.get("allowed", "")


def test_a_probe_outside_the_roots_is_refused(
    make_job: MakeJob, start: Path, general: Path, tiles: Path
) -> None:
    guard = {"probe": {"data": str(general / "pairs.csv")}}
    job = make_job(model={"name": f"local-dir:{start}"}, guard=guard)
    with pytest.raises(PathOutsideRootsError):
        task(job, 0, (tiles, start.parent))


@pytest.mark.parametrize(
    ("guard", "path"),
    [
        ({"ema_decay": 1.0}, "guard.ema_decay"),
        ({"tolerance": -0.1}, "guard.tolerance"),
        ({"points": [0.5, 0.2]}, "guard.points[1]"),
        ({"points": [1.0]}, "guard.points[0]"),
        ({"probe": {"caption_column": "text"}}, "guard.probe.data"),
    ],
    ids=["a decay of one", "a negative tolerance", "falling points", "a point at the end", "no data"],
)
def test_a_guard_that_cannot_be_is_refused_naming_the_field(
    make_job: MakeJob, guard: dict[str, Any], path: str
) -> None:
    with pytest.raises(SpecError) as caught:
        make_job(guard=guard).folder.spec()
    assert caught.value.metadata["path"] == path


def test_a_sample_is_of_images_and_does_not_depend_on_the_order_of_rows() -> None:
    pairs = [
        Pair(row=row, image=Path(f"{row // 2}.png"), reference=f"{row // 2}.png", caption=str(row))
        for row in range(40)
    ]
    few = sampled(pairs, 5)
    assert len({pair.reference for pair in few}) == 5
    assert len(few) == 10
    assert set(few) == set(sampled(pairs[::-1], 5))


# -- its parts


def test_other_weights_are_put_in_for_a_while_and_the_own_come_back_whatever_happens(clip: Clip) -> None:
    own = weights(clip)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items()}

    def fail() -> None:
        with put_in(clip, zeros):
            assert all(bool((tensor == 0).all()) for tensor in changing(clip).values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(tensor, own[name]) for name, tensor in changing(clip).items())


def test_points_between_are_those_of_the_formula_and_the_ends_are_exact(clip: Clip, tmp_path: Path) -> None:
    first = StartingWeights.keep(clip, tmp_path / "start.safetensors")
    trained = {name: tensor + 0.5 for name, tensor in weights(clip).items()}
    whole, none = first.between(trained, 1.0), first.between(trained, 0.0)
    assert all(torch.equal(whole[name], tensor) for name, tensor in trained.items())
    assert all(torch.equal(none[name], tensor) for name, tensor in changing(clip).items())
    part = first.between(trained, 0.3)
    assert all(
        torch.allclose(part[name], 0.7 * now + 0.3 * trained[name]) for name, now in changing(clip).items()
    )


def test_what_is_frozen_is_not_kept(clip: Clip, tmp_path: Path) -> None:
    clip.model.visual.requires_grad_(False)  # type: ignore[union-attr]
    kept = StartingWeights.keep(clip, tmp_path / "start.safetensors").whole()
    assert kept
    assert not any(name.startswith("visual.") for name in kept)


def test_a_running_mean_is_that_of_its_recursion_and_survives_a_checkpoint(clip: Clip) -> None:
    mean = RunningMean(clip, 0.6)
    name, held = next(iter(changing(clip).items()))
    expected = held.clone()
    for step in range(1, 8):
        with torch.no_grad():
            held.add_(1.0)
        mean.step_done(step)
        leaves = min(0.6, (1 + step) / (10 + step))
        expected = leaves * expected + (1 - leaves) * held
    assert torch.allclose(mean.weights()[name], expected, atol=1e-5)
    again = RunningMean(clip, 0.6)
    again.restore(mean.state())
    assert torch.equal(again.weights()[name], mean.weights()[name])


def test_a_model_agrees_with_itself_at_any_scale_and_less_with_another(clip: Clip) -> None:
    probe = AgreementProbe(32, lambda: None)
    assert probe.remember(clip).value == pytest.approx(1.0)
    with torch.no_grad():
        clip.model.logit_scale.add_(1.0)  # type: ignore[union-attr, operator]
    assert probe.measure(clip, resamples=0).value == pytest.approx(1.0)
    other = probe.measure(build(ModelSource(name="cliptune-test-vit"), seed=9), resamples=0)
    assert other.value < 0.7


def test_a_correlation_is_that_of_numpy_row_by_row_and_flat_rows_agree_with_flat_ones() -> None:
    random = np.random.default_rng(1)
    left, right = random.normal(size=(2, 6, 9))
    expected = np.mean([np.corrcoef(left[row], right[row])[0, 1] for row in range(6)])
    assert correlation(left, right) == pytest.approx(expected)
    flat = np.ones((1, 9))
    assert correlation(flat, 3 * flat) == 1.0
    assert correlation(flat, right[:1]) == 0.0


def test_pictures_and_words_are_the_same_each_time_and_no_two_alike() -> None:
    ours, again = drawings(), drawings()
    assert [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in again]
    assert len({picture.tobytes() for picture in ours}) == len(ours) >= 80
    texts = everyday_texts()
    assert len(set(texts)) == len(texts) >= 200


# -- the choice


def points(*rows: tuple[float, float, float]) -> list[Point]:
    return [Point(share=share, domain=domain, general=general) for share, domain, general in rows]


def test_the_best_point_is_chosen_among_those_within_the_tolerance() -> None:
    curve = choose(
        points((0.0, 0.5, 0.8), (0.4, 0.7, 0.795), (0.6, 0.75, 0.79), (0.8, 0.78, 0.78), (1.0, 0.8, 0.7)),
        0.01,
    )
    assert curve.share == 0.6
    assert "keeping 83% of the domain's gain" in curve.reason
    gained = choose(points((0.0, 0.5, 0.8), (1.0, 0.7, 0.82)), 0.01)
    assert gained.reason == "the trained weights: the domain's best, without a general loss"


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        (((0.0, 0.5, 0.8), (0.5, 0.9, 0.8), (1.0, 0.9, 0.8)), 0.5),
        (((0.0, 0.5, 0.8), (0.5, 0.9, 0.795), (1.0, 0.9, 0.8)), 1.0),
        (((0.0, 0.5, 0.8), (0.5, 0.4, 0.8), (1.0, 0.3, 0.8)), 0.0),
        (((0.0, 0.5, 0.8), (0.5, 0.6, 0.9), (1.0, 0.7, 0.85)), 1.0),
        (((0.0, 0.5, 0.8), (0.5, 0.6, 0.5), (1.0, 0.7, 0.4)), 0.0),
    ],
    ids=["a tie", "a tie that loses less", "no gain", "a general gain", "all lose too much"],
)
def test_ties_go_to_what_loses_less_and_no_gain_to_the_start(
    rows: tuple[tuple[float, float, float], ...], share: float
) -> None:
    curve = choose(points(*rows), 0.01)
    assert curve.share == share
    assert json.dumps(curve.reason)
