"""Counting, planning, probing and keeping the micro-batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from cliptune_model.attention import AttentionPlan, image_tokens, installed
from cliptune_model.clip import Clip
from cliptune_model.machine.workload import Workload
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.memory import estimate as estimating
from cliptune_trainer.memory import pressure
from cliptune_trainer.memory.cache import CachedPlan, PlanCache
from cliptune_trainer.memory.count import LiveBytes
from cliptune_trainer.memory.estimate import OVERHEAD, Estimate, Estimator
from cliptune_trainer.memory.micro_batch import PATIENCE_STEPS, MicroBatch
from cliptune_trainer.memory.plan import Demand, DoesNotFitError, Way, even_parts, passes, settle, ways
from cliptune_trainer.memory.probe import MAX_PROBES, DeviceProbe, Measured, search
from cliptune_trainer.out_of_memory import is_out_of_memory
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.checkpointing import Checkpointed, enable_checkpointing
from cliptune_trainer.steps.precision import Precision
from tests.trainer.towers import small_batch, small_clip

SDPA = AttentionPlan(mode="sdpa")
SLICED = AttentionPlan(mode="sliced", budget_bytes=1 << 20)
MIB = 1 << 20


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 5.3 GB, other allocations: 1.2 GB, max allowed: 6.8"
            " GB). Tried to allocate 512.00 MB on private pool."
        ),
        RuntimeError("Invalid buffer size: 24.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_known_in_all_its_forms(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_the_cpus_own_refusal_is_known_and_other_errors_are_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("MPS backend out of memory"))


def test_live_bytes_are_counted_once_until_the_last_view_is_gone() -> None:
    with LiveBytes("cpu") as live:
        whole = torch.empty(1024)
        view = whole[:10]
        both = whole + 1
        assert live.now == 2 * 4096
        del whole
        assert live.now == 2 * 4096
        del view, both
        assert (live.now, live.peak) == (0, 2 * 4096)


# -- the estimate


def deep_clip() -> Clip:
    """Towers of five layers."""
    base = small_clip("vit")
    vision = {"image_size": 32, "layers": 5, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 5}
    return replace(base, model=open_clip.CLIP(32, vision, text))


def estimator(clip: Clip, device_type: str = "cpu", precision: str = "fp32") -> Estimator:
    return Estimator(
        clip,
        device_type=device_type,
        precision=precision,
        text_tokens=16,
        workload=Workload.of(clip, batch_size=64, image_tokens=image_tokens(clip)),
        recompute=enable_checkpointing,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counting_the_first_of_like_layers_counts_them_all(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = deep_clip()
    quick = estimator(clip, "mps")(SDPA, checkpointing=checkpointing)
    monkeypatch.setattr(estimating, "_stacks", lambda model: [])
    whole = estimator(clip, "mps")(SDPA, checkpointing=checkpointing)
    assert quick.pair_bytes == pytest.approx(whole.pair_bytes, rel=0.03)
    assert quick.at(64) == pytest.approx(whole.at(64), rel=0.03)


def test_the_estimate_is_what_a_real_step_holds() -> None:
    clip = deep_clip()
    estimated = estimator(clip)(SDPA, checkpointing=False)
    batch = small_batch(48)
    batch = replace(batch, tokens_BL=batch.tokens_BL % 64)

    def peak(pairs: int) -> int:
        with LiveBytes("cpu") as live:
            part = replace(batch, images_B3HW=batch.images_B3HW[:pairs], tokens_BL=batch.tokens_BL[:pairs])
            part = replace(
                part, image_ids_B=batch.image_ids_B[:pairs], caption_ids_B=batch.caption_ids_B[:pairs]
            )
            accumulate(clip, Objective(), Precision("fp32", "cpu"), part, pairs)
        peak_bytes: int = live.peak
        return peak_bytes

    clip.model.train()
    measured = (peak(48) - peak(24)) / 24
    assert estimated.pair_bytes / OVERHEAD["cpu"] == pytest.approx(measured, rel=0.1)


def test_each_way_to_save_memory_is_seen_in_the_estimate_and_the_model_is_not_touched() -> None:
    clip = deep_clip()
    before = {name: (weight.data_ptr(), weight.grad) for name, weight in clip.model.named_parameters()}
    on_mps = estimator(clip, "mps")
    whole, blocked = (on_mps(plan, checkpointing=False) for plan in (SDPA, SLICED))
    recomputed = on_mps(SDPA, checkpointing=True)
    half = estimator(clip, "mps", "fp16")(SDPA, checkpointing=False)
    assert blocked.pair_bytes < whole.pair_bytes
    assert recomputed.pair_bytes < blocked.pair_bytes
    assert 0.4 * whole.pair_bytes < half.pair_bytes < 0.8 * whole.pair_bytes
    assert {n: (w.data_ptr(), w.grad) for n, w in clip.model.named_parameters()} == before
    assert installed(clip.model).mode == "sdpa"


def test_an_estimate_is_a_line() -> None:
    line = Estimate(fixed_bytes=100, pair_bytes=7)
    assert (line.at(3), line.pairs_within(121), line.pairs_within(99)) == (121, 3, -1)


# -- the plan


def demand(**changes: Any) -> Demand:
    question: dict[str, Any] = {
        "batch_size": 256,
        "budget_bytes": 1000 * MIB,
        "device_type": "mps",
        "tokens": 274,
        "loss_bytes": 0,
        "attentions": (SDPA, SLICED),
    }
    return Demand(**{**question, **changes})


def counted(attention: AttentionPlan, checkpointing: bool) -> Estimate:
    """As of a ViT-B/16 in half precision, with little state."""
    pair = {("sdpa", False): 118, ("sliced", False): 83, ("sdpa", True): 11, ("sliced", True): 10}
    return Estimate(fixed_bytes=200 * MIB, pair_bytes=pair[attention.mode, checkpointing] * MIB)


def test_a_batch_that_fits_whole_is_computed_whole_and_nothing_else_is_counted() -> None:
    asked = []

    def count(attention: AttentionPlan, checkpointing: bool) -> Estimate:
        asked.append((attention.mode, checkpointing))
        return counted(attention, checkpointing)

    found = ways(demand(budget_bytes=40_000 * MIB), count)
    assert [(way.micro_batch_size, way.checkpointing, way.attention.mode) for way in found] == [
        (256, False, "sdpa")
    ]
    assert asked == [("sdpa", False)]


def test_parts_too_small_to_keep_the_device_busy_give_way_to_recomputing() -> None:
    tight = ways(demand(), counted)
    assert (tight[0].checkpointing, tight[0].micro_batch_size) == (True, 64)
    roomy = ways(demand(budget_bytes=8000 * MIB), counted)
    assert (roomy[0].checkpointing, roomy[0].micro_batch_size) == (False, 64)
    for budget, found in ((1000, tight), (8000, roomy)):
        assert all(way.peak_bytes <= budget * MIB for way in found)
        assert [way.cost for way in found] == sorted(way.cost for way in found)


def test_what_the_user_fixed_and_what_computes_rightly_bound_the_micro_batch() -> None:
    assert ways(demand(micro_batch_size=4), counted)[0].micro_batch_size == 4
    assert all(way.micro_batch_size <= 30 for way in ways(demand(max_micro_batch=30), counted))
    only = demand(checkpointing=(True,), attentions=(SLICED,))
    assert {(way.checkpointing, way.attention.mode) for way in ways(only, counted)} == {(True, "sliced")}
    with pytest.raises(DoesNotFitError):
        ways(demand(micro_batch_size=100), counted)


def test_where_nothing_fits_the_least_of_all_ways_is_named() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        ways(demand(budget_bytes=150 * MIB), counted)
    assert caught.value.smallest.peak_bytes == 210 * MIB
    assert caught.value.smallest.checkpointing


def test_parts_are_even_and_no_more_than_needed() -> None:
    assert even_parts(256, 100) == 86
    assert even_parts(256, 64) == 64
    assert even_parts(1000, 130) == 125
    assert even_parts(7, 3) == 3
    assert even_parts(8, 0) == 0
    for batch in range(2, 60):
        for most in range(1, batch + 1):
            assert 1 <= even_parts(batch, most) <= most


def test_every_choice_of_a_plan_has_a_reason() -> None:
    question = demand(budget_bytes=1000 * MIB, loss_bytes=30 * MIB)
    found = ways(question, counted)
    plan = settle(question, found[0], found, source="estimated")
    assert plan.estimated_bytes == found[0].peak_bytes <= plan.budget_bytes
    reasons = {choice.subject: choice.reason for choice in plan.choices}
    assert "with the same gradient" in reasons["micro_batch_size"]
    assert "room for" in reasons["checkpointing"]
    assert plan.attention_plan.mode == plan.attention


# -- the probe


class Device:
    """Arithmetic in place of a device: true bytes and speed of each way."""

    def __init__(self, pair_bytes: Callable[[Way], float], speed: Callable[[Way], float]) -> None:
        self.pair_bytes, self.speed = pair_bytes, speed
        self.limit_bytes = 1000 * MIB
        self.probes = 0

    def __call__(self, way: Way) -> Measured:
        self.probes += 1
        peak = int(200 * MIB + way.micro_batch_size * self.pair_bytes(way))
        if peak > self.limit_bytes:
            return Measured(peak_bytes=None)
        return Measured(peak_bytes=peak, pair_s=self.speed(way))

    def seconds(self, question: Demand, way: Way) -> float:
        whole = passes(question.batch_size, way.micro_batch_size, checkpointing=way.checkpointing)
        return self.speed(way) * whole / passes(1, 1, checkpointing=way.checkpointing)


@pytest.mark.parametrize("error", [0.3, 0.7, 1.0, 1.4, 3.0])
@pytest.mark.parametrize("half_speed", [0, 8, 60])
def test_few_probes_find_nearly_the_best_however_wrong_the_estimate(error: float, half_speed: int) -> None:
    question = demand()
    device = Device(
        lambda way: counted(way.attention, way.checkpointing).pair_bytes * error,
        lambda way: (
            (3 + way.checkpointing) * (way.micro_batch_size + half_speed) / way.micro_batch_size / 3000
        ),
    )
    found = search(question, ways(question, counted), device)
    assert found is not None
    assert device.probes == found.probes <= MAX_PROBES
    every = [
        replace(way, micro_batch_size=even_parts(256, pairs))
        for way in ways(question, counted)
        for pairs in range(1, 257)
    ]
    best = min(device.seconds(question, way) for way in every if device(way).peak_bytes is not None)
    assert device(found.way).peak_bytes is not None
    assert device.seconds(question, found.way) <= best / 0.9


def test_where_no_probe_fits_there_is_no_way() -> None:
    question = demand()
    device = Device(lambda way: 1e12, lambda way: 1.0)
    assert search(question, ways(question, counted), device) is None
    assert device.probes <= MAX_PROBES


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_probe_leaves_the_model_as_it_found_it(kind: str) -> None:
    clip = small_clip(kind)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    random = torch.get_rng_state()
    probe = DeviceProbe(clip, Precision("bf16", "cpu"), text_tokens=16, extra_bytes=5)
    way = Way(
        attention=SLICED,
        checkpointing=True,
        estimate=Estimate(fixed_bytes=0, pair_bytes=1),
        micro_batch_size=4,
        cost=0.0,
    )
    measured = probe(way)
    assert measured.pair_s > 0
    assert measured.peak_bytes == 5
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(weight.grad is None for weight in clip.model.parameters())
    assert installed(clip.model).mode == "sdpa"
    assert not any(isinstance(module.forward, Checkpointed) for module in clip.model.modules())


def test_a_probe_that_runs_out_of_memory_says_so() -> None:
    clip = small_clip("vit")
    probe = DeviceProbe(clip, Precision("fp32", "cpu"), text_tokens=16, extra_bytes=0)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    handle = clip.model.get_submodule("visual").register_forward_hook(hook)
    way = Way(
        attention=SDPA,
        checkpointing=False,
        estimate=Estimate(fixed_bytes=0, pair_bytes=1),
        micro_batch_size=2,
        cost=0.0,
    )
    assert probe(way) == Measured(peak_bytes=None)
    handle.remove()


# -- over the course of a run


def steps_until_growth(kept: MicroBatch) -> int:
    steps = 0
    while not kept.may_grow:
        kept.step_done()
        steps += 1
    return steps


def test_a_micro_batch_halves_and_grows_back_with_care() -> None:
    kept = MicroBatch(12)
    assert kept.halve()
    assert kept.halve()
    assert kept.size == 3
    assert steps_until_growth(kept) == PATIENCE_STEPS
    kept.grow()
    assert kept.size == 6
    kept.halve()  # the growth was in vain
    assert steps_until_growth(kept) == 2 * PATIENCE_STEPS
    kept = MicroBatch.of(json.loads(json.dumps(kept.state())))
    sizes = []
    while kept.reduced:
        steps_until_growth(kept)
        kept.grow()
        sizes.append(kept.size)
    assert sizes == [6, 12]
    kept = MicroBatch(1)
    assert not kept.halve()


def test_a_shortage_is_told_by_what_each_system_says() -> None:
    assert pressure.short_of("the GPU", 10 * MIB, 1000 * MIB) == "the GPU has 10 MiB of 1000 left"
    assert not pressure.short_of("the GPU", 300 * MIB, 1000 * MIB)
    calm = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=99.00 avg60=0 avg300=0 total=0\n"
    assert not pressure.stalls(calm)
    assert "41 % of the time" in pressure.stalls(calm.replace("some avg10=0.00", "some avg10=41.20"))
    assert not pressure.stalls("")
    assert [pressure.macos_pressure(level) for level in (0, 1)] == ["", ""]
    assert "critically" in pressure.macos_pressure(4)


def test_the_system_is_asked_once_a_second() -> None:
    seconds = iter([0.0, 0.5, 1.5, 1.5, 1.6])
    asked = pressure.Pressure(torch.device("cpu"), clock=lambda: next(seconds))
    assert [asked.due() for _ in range(3)] == [False, True, False]
    assert isinstance(asked.told(), str)


# -- what was found before


def test_a_plan_is_found_again_for_the_same_question_alone(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    plan = CachedPlan(
        micro_batch_size=8,
        checkpointing=True,
        attention="sliced",
        block_bytes=1,
        estimated_bytes=2,
        probed=True,
    )
    question = {"model": "a", "versions": ["1"]}
    assert cache.get(question) is None
    cache.put(question, plan)
    assert PlanCache(tmp_path).get(question) == plan
    assert cache.get({**question, "versions": ["2"]}) is None
    for file in (tmp_path / "plans").iterdir():
        file.write_text("{")
    assert cache.get(question) is None
    PlanCache(None).put(question, plan)
    assert PlanCache(None).get(question) is None
