"""Jobs that run by a plan: in parts, within a budget, through full memory, giving way to inference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn

from cliptune.errors import InvalidInputError, OverloadedError, SpecError
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_trainer.reporting.commands import Inbox
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob
from tests.trainer.test_trainer_run import _free_again, prepared, trained

__all__ = ["_free_again"]  # a run makes torch deterministic for its process

SHORT = {"epochs": 1, "batch_size": 12, "clip_norm": 0.0}


def plan_of(job: TrainerJob) -> job_pb2.JobPlan:
    return next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))


def progress_of(job: TrainerJob, attempt: int = 1) -> list[job_pb2.Progress]:
    events = [event.event for event in job.journal(attempt)]
    return [event.progress for event in events if event.HasField("progress")]


def close(one: TrainerJob, other: TrainerJob) -> None:
    """The same losses and gradients to the rounding of fp32."""
    assert one.losses(1).keys() == other.losses(1).keys()
    for step, numbers in one.losses(1).items():
        assert numbers == pytest.approx(other.losses(1)[step], rel=2e-4)


def test_the_plan_shows_how_the_step_is_computed_and_why(make_job: MakeJob) -> None:
    job = make_job(train=SHORT, resources={"memory_gib": 2.0})
    prepared(job)
    plan = plan_of(job)
    assert (plan.micro_batch_size, plan.attention, plan.checkpointing) == (12, "sdpa", False)
    assert plan.memory_budget_bytes == 2 << 30
    assert 0 < plan.estimated_memory_bytes < plan.memory_budget_bytes
    decisions = {decision.subject: decision for decision in plan.decisions}
    assert decisions.keys() >= {
        "precision",
        "memory_budget",
        "micro_batch_size",
        "checkpointing",
        "attention",
        "loss tiling",
        "compile",
        "lean_towers",
        "half_weights",
        "text_trimming",
        "fused_optimizer",
    }
    assert all(decision.choice and decision.reason for decision in plan.decisions)
    assert decisions["memory_budget"].choice == "2.0 GiB"


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        ({"train": {"attention": "flash"}}, "train.attention"),
        ({"train": {"checkpointing": "yes"}}, "train.checkpointing"),
        ({"train": {"micro_batch_size": 0}}, "train.micro_batch_size"),
        ({"train": {"compile": "maybe"}}, "train.compile"),
        ({"loss": {"tiling": "some"}}, "loss.tiling"),
        ({"resources": {"memory_gib": 0.0}}, "resources.memory_gib"),
        ({"model": {"context_length": 999}}, "model.context_length"),
    ],
)
def test_the_planners_own_fields_are_checked(make_job: MakeJob, parts: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as caught:
        prepared(make_job(**parts))
    assert caught.value.metadata["path"] == path


def test_a_batch_in_parts_trains_as_the_whole_batch_does(make_job: MakeJob) -> None:
    whole = make_job("whole", train=SHORT)
    parts = make_job(
        "parts",
        train={**SHORT, "micro_batch_size": 5, "checkpointing": "on", "attention": "chunked"},
        loss={"tiling": "on"},
    )
    for job in (whole, parts):
        assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    close(whole, parts)
    assert {progress.micro_batch_size for progress in progress_of(whole)} == {12}
    assert {progress.micro_batch_size for progress in progress_of(parts)} == {5}


def test_a_resumed_run_repeats_the_plan_bit_for_bit(make_job: MakeJob) -> None:
    job = make_job(train={**SHORT, "micro_batch_size": 5}, checkpoint={"every_steps": 2, "keep": 9})
    trained(job)
    for folder in job.folder.checkpoints.iterdir():
        if folder.name != "step-00000002":
            shutil.rmtree(folder)
    shutil.rmtree(job.folder.export)
    assert trained(job, 2).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert job.losses(2) == {step: numbers for step, numbers in job.losses(1).items() if step > 2}
    assert job.losses(2)
    assert {progress.micro_batch_size for progress in progress_of(job, 2)} == {5}


def test_a_run_that_goes_on_upon_another_kind_of_device_is_planned_anew(make_job: MakeJob) -> None:
    job = make_job(train=SHORT, checkpoint={"every_steps": 2, "keep": 9})
    trained(job)
    for folder in job.folder.checkpoints.iterdir():
        if folder.name != "step-00000002":
            shutil.rmtree(folder)
    shutil.rmtree(job.folder.export)
    # As a device would have left it that had room for four pairs, and for two of late.
    kept = job.folder.checkpoints / "step-00000002" / "training.json"
    content = json.loads(kept.read_text())
    counters = content["counters"]
    counters["execution"] |= {"device": "mps", "micro_batch_size": 4}
    (micro_batch,) = counters["micro_batches"].values()
    micro_batch |= {"planned": 4, "size": 2}
    kept.write_text(json.dumps(content))
    assert trained(job, 2).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert {progress.micro_batch_size for progress in progress_of(job, 2)} == {12}


@contextmanager
def image_tower_out_of_memory(above: int) -> Iterator[None]:
    """More than so many images at once meet the allocator's own refusal, in training."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tower = isinstance(module, VisionTransformer | ModifiedResNet)
        if tower and module.training and len(inputs[0]) > above:
            torch.empty(1 << 60, dtype=torch.uint8)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_out_of_memory_in_mid_run_halves_the_micro_batch_and_changes_nothing_else(make_job: MakeJob) -> None:
    undisturbed, disturbed = make_job("undisturbed", train=SHORT), make_job("disturbed", train=SHORT)
    trained(undisturbed)
    with image_tower_out_of_memory(above=4):
        assert trained(disturbed).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    close(undisturbed, disturbed)
    assert {progress.micro_batch_size for progress in progress_of(disturbed)} == {3}
    notices = [event.event.notice for event in disturbed.journal(1) if event.event.HasField("notice")]
    assert [notice.code for notice in notices].count("micro-batch-halved") == 2
    assert "3 now; the batch and its gradient stay" in disturbed.notices(1)["micro-batch-halved"]


def test_a_smaller_micro_batch_promises_no_same_gradient_where_parts_are_normalised_by_themselves(
    make_job: MakeJob, clip: Clip, tmp_path: Path
) -> None:
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {**clip.model_config, "embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    model = replace(clip, model=open_clip.CLIP(32, vision, text), model_config=config)
    export_model(model, tmp_path / "resnet", manifest_of(model))
    short = {**SHORT, "max_steps": 1}
    job = make_job(model={"name": f"local-dir:{tmp_path / 'resnet'}"}, train=short, guard={"off": True})
    with image_tower_out_of_memory(above=6):
        assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    told = job.notices(1)["micro-batch-halved"]
    assert "6 now" in told
    assert "normalised by its own statistics" in told
    assert "gradient" not in told


def test_where_not_even_one_pair_fits_any_more_the_run_fails_with_the_reason(make_job: MakeJob) -> None:
    job = make_job(train=SHORT)
    with image_tower_out_of_memory(above=0), pytest.raises(OverloadedError, match="not even with one pair"):
        trained(job)


@pytest.fixture
def wide_model(clip: Clip, tmp_path: Path) -> str:
    """14 million weights: with their gradients and moments more than an eighth of a GiB."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 256, "heads": 2, "layers": 1}
    config = {**clip.model_config, "embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    wide = replace(clip, model=open_clip.CLIP(32, vision, text), model_config=config)
    export_model(wide, tmp_path / "wide", manifest_of(wide))
    return f"local-dir:{tmp_path / 'wide'}"


def test_a_model_that_cannot_fit_is_refused_with_by_how_much_and_what_would_fit(
    make_job: MakeJob, wide_model: str
) -> None:
    job = make_job(model={"name": wide_model}, train=SHORT, resources={"memory_gib": 0.125})
    with pytest.raises(InvalidInputError) as caught:
        prepared(job)
    told = caught.value.message
    assert "even with one pair at a time" in told
    assert "the budget on cpu is 128 MiB" in told
    assert "too little" in told
    assert "What would fit" in told
    assert "LoRA" in told
    assert "a frozen text tower" in told


def test_a_micro_batch_that_cannot_fit_is_refused_with_one_that_does(make_job: MakeJob) -> None:
    job = make_job(
        train={**SHORT, "batch_size": 48, "micro_batch_size": 48},
        resources={"memory_gib": 0.22},
        model={"name": "cliptune-tiny-vit"},
    )
    with pytest.raises(InvalidInputError, match=r"What would fit: train\.micro_batch_size of at most \d+"):
        prepared(job)


def instruction(command_id: str, **command: Any) -> trainer_pb2.Instruction:
    return trainer_pb2.Instruction(command_id=command_id, command=job_pb2.JobCommand(**command))


def yielding(seconds: float, command_id: str = "") -> trainer_pb2.Instruction:
    return instruction(command_id, yield_to_inference=job_pb2.YieldToInferenceCommand(seconds=seconds))


def test_a_trainer_that_yields_still_obeys_and_answers_only_those_who_asked(make_job: MakeJob) -> None:
    job, inbox = make_job(train=SHORT), Inbox()
    inbox.put(yielding(60.0))
    inbox.put(yielding(60.0, "user"))
    inbox.put(yielding(61.0, "too long"))
    inbox.put(instruction("pause", pause=job_pb2.PauseCommand()))
    assert trained(job, inbox=inbox).outcome == trainer_pb2.OUTCOME_PAUSED
    answers = [event.event.command for event in job.journal(1) if event.event.HasField("command")]
    assert [answer.command_id for answer in answers] == ["user", "too long", "pause"]
    assert [answer.HasField("error") for answer in answers] == [False, True, False]
    assert "0 to 60" in answers[1].error.message


def test_a_yield_ends_when_it_is_taken_back_and_when_its_time_is_over(make_job: MakeJob) -> None:
    job, inbox = make_job(train=SHORT), Inbox()
    inbox.put(yielding(60.0))
    inbox.put(yielding(0.0))
    inbox.put(yielding(0.05))
    assert trained(job, inbox=inbox).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert len(job.losses(1)) == 4


def test_the_sigmoid_loss_gives_a_model_its_bias_and_calibrates_a_pretrained_one(
    make_job: MakeJob, clip: Clip, tmp_path: Path
) -> None:
    sigmoid = {"name": "sigmoid"}
    scratch = make_job("scratch", train=SHORT, loss=sigmoid)
    prepared(scratch)
    assert {item.subject: item.choice for item in plan_of(scratch).decisions}["logit_bias"] == "-10"
    trained(scratch)
    first = progress_of(scratch)[0]
    assert first.logit_scale == pytest.approx(10.0, rel=0.01)
    exported = load_exported(scratch.folder.export)
    assert float(exported.model.logit_bias.detach()) == pytest.approx(-10.0, abs=0.5)  # type: ignore[operator]

    with torch.no_grad():
        clip.model.logit_scale.fill_(4.6052)  # type: ignore[operator]
    export_model(clip, tmp_path / "softmax", manifest_of(clip))
    tuned = make_job("tuned", train=SHORT, loss=sigmoid, model={"name": f"local-dir:{tmp_path / 'softmax'}"})
    trained(tuned)
    assert "logit-bias-calibrated" in tuned.notices(1)
    # Without it, every other pair would count as a confident match.
    assert progress_of(tuned)[0].loss < 100
