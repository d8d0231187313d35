from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from cliptune.errors import InvalidInputError
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip
from cliptune_trainer.losses import Contrast
from cliptune_trainer.losses.objective import Features, Objective
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.steps.nan_guard import Culprit
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.precision import LossScaler, Precision
from cliptune_trainer.steps.step import Step
from cliptune_trainer.training.checkpoint import checkpoints
from cliptune_trainer.training.outcomes import MAX_SKIPPED_IN_ROW
from cliptune_trainer.training.run import run
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob
from tests.trainer.towers import small_batch, small_clip

Hook = Callable[..., Any]


def make(clip: Clip, precision: str = "fp32", micro_batch_size: int | None = None) -> tuple[Step, Precision]:
    settings = Precision(precision, "cpu")
    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    step = Step(clip, Objective(), optimizer, settings, clip_norm=1.0, micro_batch_size=micro_batch_size)
    return step, settings


def scaler_of(settings: Precision) -> LossScaler:
    assert settings.scaler is not None
    return settings.scaler


def module(clip: Clip, name: str) -> nn.Module:
    return clip.model.get_submodule(name)


def test_the_scale_moves_as_torchs_own_and_their_states_are_exchanged() -> None:
    ours, torchs = LossScaler("cpu"), GradScaler("cpu")
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    state = ours.state_dict() | {"_growth_tracker": LossScaler.GROWTH_INTERVAL - 3}
    torchs.load_state_dict(state)
    ours.load_state_dict(state)
    scales = []
    for step in range(8):
        overflowed = step in (4, 5)
        torchs.scale(torch.zeros(()))
        weight.grad = torch.tensor(math.inf if overflowed else 1.0)
        torchs.step(optimizer)
        torchs.update()
        ours.update(torch.tensor(overflowed))
        assert ours.state_dict() == torchs.state_dict()
        scales.append(float(ours.scale) / LossScaler.INITIAL)
    assert scales == [1, 1, 2, 2, 1, 0.5, 0.5, 0.5]
    again = LossScaler("cpu")
    again.load_state_dict(torchs.state_dict())
    assert again.state_dict() == ours.state_dict()


def test_the_scale_has_a_floor() -> None:
    scaler = LossScaler("cpu")
    for _ in range(40):
        scaler.update(torch.tensor(True))
    assert float(scaler.scale) == LossScaler.FLOOR
    scaler.load_state_dict({"scale": LossScaler.FLOOR, "_growth_tracker": LossScaler.GROWTH_INTERVAL - 1})
    scaler.update(torch.tensor(False))
    assert float(scaler.scale) == 2 * LossScaler.FLOOR


def gradient_times(factor: float) -> Hook:
    """A hook after which the gradient of a module's output is that much larger."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]

    return hook


def test_an_overflow_is_skipped_and_lowers_the_scale_until_the_gradients_fit() -> None:
    clip, pairs = small_clip("vit"), small_batch(6)
    module(clip, "ln_final").register_forward_hook(gradient_times(1e4))
    step, settings = make(clip, "fp16", micro_batch_size=4)
    weights = {name: value.clone() for name, value in clip.model.state_dict().items()}
    results = []
    while not results or results[-1].skipped:
        assert all(torch.equal(value, weights[name]) for name, value in clip.model.state_dict().items())
        results.append(step(pairs, 1e-3))
    assert len(results) > 2
    assert [result.loss_scale for result in results] == [65536 / 2**number for number in range(len(results))]
    assert {result.loss for result in results} == {results[0].loss}
    assert all(result.culprit is None for result in results), "an overflow of the scale is nobody's fault"
    assert math.isfinite(results[-1].gradient_norm)
    assert float(scaler_of(settings).scale) == results[-1].loss_scale
    assert not torch.equal(clip.model.state_dict()["ln_final.weight"], weights["ln_final.weight"])


def test_an_overflow_at_the_floor_ends_the_run_with_the_reason_and_unharmed_weights() -> None:
    clip, pairs = small_clip("vit"), small_batch(6)
    weights = {name: value.clone() for name, value in clip.model.state_dict().items()}
    module(clip, "transformer.resblocks.1").register_forward_hook(gradient_times(1e9))
    step, settings = make(clip, "fp16")
    scaler_of(settings).load_state_dict({"scale": LossScaler.FLOOR, "_growth_tracker": 0})
    with pytest.raises(InvalidInputError, match=r"loss scale of 1 .*transformer.*bf16"):
        step(pairs, 1e-3)
    assert all(torch.equal(value, weights[name]) for name, value in clip.model.state_dict().items())


def test_the_loss_scale_is_0_where_nothing_is_scaled() -> None:
    for precision in ("fp32", "bf16"):
        step, _ = make(small_clip("vit"), precision)
        assert step(small_batch(6), 1e-3).loss_scale == 0


def test_features_are_normalised_in_fp32_whatever_the_towers_compute_in() -> None:
    seen: list[torch.dtype] = []

    class Watched(Objective):
        def weighed(self, contrast: Contrast) -> Tensor:
            image_ND, text_ND = contrast.image_NP, contrast.text_NP
            seen.extend([image_ND.dtype, text_ND.dtype, contrast.logit_scale.dtype, contrast.logits().dtype])
            assert (image_ND.norm(dim=-1) - 1).abs().max() < 1e-6
            return super().weighed(contrast)

    for precision in ("bf16", "fp16"):
        clip = small_clip("vit")
        optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
        step = Step(clip, Watched(), optimizer, Precision(precision, "cpu"), clip_norm=1.0)
        step(small_batch(4), 1e-3)
        halves = [value.dtype for value in clip.model.state_dict().values() if value.dtype != torch.float32]
        assert halves == []
    assert set(seen) == {torch.float32}


def nan_output(rows: slice = slice(None)) -> Hook:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[rows] *= math.nan
        return output

    return hook


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize(
    ("name", "hook", "what"),
    [
        ("visual.transformer.resblocks.1.mlp.c_fc", nan_output(), "output"),
        ("transformer.resblocks.0.attn", None, "output"),
        ("transformer.resblocks.1.ln_2", gradient_times(math.inf), "gradient"),
    ],
)
def test_the_first_bad_module_is_named(
    name: str, hook: Hook | None, what: str, micro_batch_size: int | None
) -> None:
    clip, pairs = small_clip("vit"), small_batch(6)
    step, _ = make(clip, micro_batch_size=micro_batch_size)
    assert step(pairs, 1e-3).culprit is None

    def nan_attention(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return output[0] * math.nan, output[1]

    handle = module(clip, name).register_forward_hook(hook or nan_attention)
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    random = torch.get_rng_state()
    result = step(pairs, 1e-3)
    assert result.skipped
    assert result.culprit is not None
    assert result.culprit.what == what
    if what == "gradient":  # between it and the module whose output comes next
        assert result.culprit.module.startswith("transformer.resblocks.1.mlp"), result.culprit
    else:
        assert result.culprit.module == name
        assert name in str(result.culprit)
    assert all(torch.equal(value, before[key]) for key, value in clip.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    handle.remove()
    assert not step(pairs, 1e-3).skipped


def test_a_bad_number_that_only_one_random_mask_makes_is_found_again() -> None:
    clip, pairs = small_clip("vit"), small_batch(6)
    step, _ = make(clip, micro_batch_size=2)

    def one_in_a_while(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output / (torch.rand(()) > 0.15)

    module(clip, "ln_final").register_forward_hook(one_in_a_while)
    torch.manual_seed(0)
    results = [step(pairs, 1e-5) for _ in range(8)]
    skipped = [result for result in results if result.skipped]
    assert 0 < len(skipped) < 8
    assert {result.culprit for result in skipped} == {Culprit(module="ln_final", what="output")}


def test_bad_input_bad_weights_and_a_bad_loss_are_told_apart() -> None:
    clip, pairs = small_clip("vit"), small_batch(6)
    step, _ = make(clip)
    pairs.images_B3HW[2, 0, 0, 0] = math.inf
    assert step(pairs, 1e-3).culprit == Culprit(module="visual.conv1", what="input")

    class Bad(Objective):
        def forward(self, clip: Clip, features: Features) -> Tensor:
            return super().forward(clip, features) * math.nan

    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    bad_loss = Step(clip, Bad(), optimizer, Precision("fp32", "cpu"), clip_norm=1.0)
    culprit = bad_loss(small_batch(6), 1e-3).culprit
    assert culprit == Culprit(module="", what="gradient")
    assert "the loss" in str(culprit)
    with torch.no_grad():
        clip.model.get_parameter("visual.proj")[0, 0] = math.nan
    assert step(small_batch(6), 1e-3).culprit == Culprit(module="visual.proj", what="parameter")


@pytest.fixture
def _free_again() -> Iterator[None]:
    """A run makes torch deterministic for its process."""
    yield
    torch.use_deterministic_algorithms(False)


def journaled(job: TrainerJob, attempt: int, work: Callable[[Reporter], object]) -> list[job_pb2.JobEvent]:
    journal = Journal(job.folder.journal(attempt), attempt)
    try:
        work(Reporter(journal))
    finally:
        journal.close()
    return [entry.event for entry in job.journal(attempt)]


def progress(events: list[job_pb2.JobEvent]) -> dict[int, tuple[float, ...]]:
    return {
        event.progress.step: (
            event.progress.loss,
            event.progress.gradient_norm,
            event.progress.loss_scale,
            event.progress.skipped_steps,
        )
        for event in events
        if event.HasField("progress")
    }


@pytest.mark.usefixtures("_free_again")
def test_a_jobs_loss_scale_is_in_its_checkpoints_and_its_skipped_steps_are_told(make_job: MakeJob) -> None:
    job = make_job(
        train={"precision": "fp16", "max_steps": 19, "micro_batch_size": 4},
        data={"validation_fraction": 0},
        checkpoint={"every_steps": 4, "keep": 9},
    )
    journaled(job, 0, lambda reporter: prepare(job.folder, [job.root], reporter))

    def train(attempt: int, from_step: int) -> list[job_pb2.JobEvent]:
        shutil.rmtree(job.path / "export", ignore_errors=True)
        for checkpoint in checkpoints(job.folder.checkpoints):
            if int(checkpoint.name.removeprefix("step-")) > from_step:
                shutil.rmtree(checkpoint)
        return journaled(
            job, attempt, lambda reporter: run(job.folder, [job.root], reporter, Inbox(), linked=False)
        )

    first = progress(train(1, 0))
    assert 0 < max(entry[2] for entry in first.values()) <= LossScaler.INITIAL
    # As if the scale had grown for long: it has to be found anew, by more tries than bad steps are allowed.
    early = job.folder.checkpoints / "step-00000004" / "training.json"
    content = json.loads(early.read_text())
    assert content["counters"]["scaler"]["scale"] >= first[19][2]
    content["counters"]["scaler"]["scale"] = 2.0**28
    early.write_text(json.dumps(content))
    again = train(2, 4)
    skipped = [event.notice for event in again if event.notice.code == "step-skipped"]
    assert len(skipped) > MAX_SKIPPED_IN_ROW
    assert {notice.severity for notice in skipped} == {job_pb2.SEVERITY_INFO}
    assert f"loss scale of {2.0**28:g}" in skipped[0].message
    found = progress(again)
    assert found[19][2:] == (2.0 ** (28 - len(skipped)), len(skipped))
    assert len(found) == 15 - len(skipped)
    # Resumed in the middle of the search, it goes on exactly there.
    assert progress(train(3, 8)) == {step: entry for step, entry in found.items() if step > 8}
