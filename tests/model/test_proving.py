"""The proofs of doctor: right on this machine, and each finds the fault that it is for, put into torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune_model import proving
from cliptune_model.machine import rules
from cliptune_model.proving import CONSEQUENCES, PROVERS, prove_all
from cliptune_model.proving.attending import prove_attention
from cliptune_model.proving.compare import SMALL, Sizes, judged, relative, sizes_for, worst
from cliptune_model.proving.shapes import prove_long_sums, prove_real_shapes, prove_resize
from cliptune_model.proving.training import prove_checkpointing, prove_fused_optimizer, prove_half

# What the fp32 proofs allow; found on the CPU: below 1e-5.
FINE = 1e-4


def test_an_accelerator_is_tried_at_the_real_shapes() -> None:
    real = sizes_for("cuda")
    assert (real.image_tokens, real.image_width, real.text_tokens) == (197, 768, 77)
    assert real.long_rows > rules.LONG_SUM
    assert sizes_for("cpu") == SMALL
    assert SMALL.long_rows == real.long_rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_proof_holds_on_a_cuda_gpu() -> None:
    found = dict(prove_all("cuda:0"))
    assert all(proof.holds for proof in found.values()), found


def test_the_rules_heed_exactly_what_is_proved() -> None:
    assert set(CONSEQUENCES) <= set(PROVERS)
    assert {
        "gradients",
        "real shapes",
        "long sums",
        "bf16",
        "fp16",
        "fused optimiser",
        "checkpointing",
    } <= set(CONSEQUENCES)
    assert {f"{mode} attention" for mode in rules.ATTENTIONS} <= set(CONSEQUENCES)


@pytest.mark.parametrize("prove", [prove_real_shapes, prove_long_sums, prove_checkpointing])
def test_right_arithmetic_is_far_below_the_limit(prove: Callable[[str, Sizes], Any]) -> None:
    proof = prove("cpu", SMALL)
    assert proof.holds
    assert float(proof.told.rpartition(" ")[2]) < FINE


def test_differences_are_relative_and_not_a_number_is_never_right() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative(exact * 1.1, exact) == pytest.approx(0.1)
    assert worst({"a": exact, "tiny": exact * 2e-9}, {"a": exact, "tiny": exact * 1e-9}) == 0.0
    nan = relative(torch.tensor([float("nan"), 4.0]), exact)
    assert not judged(nan, 1e9, "it").holds
    assert not judged(worst({"a": exact, "b": exact * nan}, {"a": exact, "b": exact}), 1e9, "it").holds


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.layer_norm

    def wrong_in_fp32(x: Tensor, *rest: Any, **more: Any) -> Tensor:
        return right(x, *rest, **more) * (1.05 if x.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(F, "layer_norm", wrong_in_fp32)
    for name in ("gradients", "real shapes"):
        assert not PROVERS[name]("cpu", SMALL).holds


def test_a_sum_past_the_end_of_its_operands_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tensor.__matmul__

    def too_long(a: Tensor, b: Tensor) -> Tensor:
        product = right(a, b)
        return product + 100.0 if a.shape[-1] >= rules.LONG_SUM and a.dtype == torch.float32 else product

    monkeypatch.setattr(Tensor, "__matmul__", too_long)
    assert not prove_long_sums("cpu", SMALL).holds
    assert prove_real_shapes("cpu", SMALL).holds


def test_a_recomputation_that_draws_another_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.get_rng_state()
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert not prove_checkpointing("cpu", SMALL).holds
    monkeypatch.undo()
    torch.set_rng_state(start)
    assert prove_checkpointing("cpu", SMALL).holds


def test_a_fused_optimiser_that_steps_on_an_overflow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._fused_adamw_

    def deaf(*arguments: Any, found_inf: Tensor | None = None, **more: Any) -> None:
        right(*arguments, found_inf=None, **more)

    monkeypatch.setattr(torch, "_fused_adamw_", deaf)
    proof = prove_fused_optimizer("cpu", SMALL)
    assert not proof.holds
    assert "nan" in proof.told


def test_zeroed_gradients_under_the_scaler_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.amp.GradScaler.unscale_

    def zeroing(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        right(scaler, optimizer)
        optimizer.param_groups[0]["params"][0].grad.zero_()

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", zeroing)
    proof = prove_half("fp16")("cpu", SMALL)
    assert not proof.holds
    assert "1.0e+00" in proof.told


def test_attention_that_sees_later_tokens_in_half_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention

    def leaking(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Any) -> Tensor:
        return right(q, k, v, None if q.dtype == torch.bfloat16 else mask, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", leaking)
    proof = prove_attention("sdpa")("cpu", SMALL)
    assert not proof.holds
    assert "later ones" in proof.told


def test_a_device_without_a_bicubic_gradient_is_no_fault_for_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = F.interpolate

    def without_backward(x: Tensor, *rest: Any, **more: Any) -> Tensor:
        if x.requires_grad:
            raise NotImplementedError("aten::_upsample_bicubic2d_aa_backward")
        return right(x, *rest, **more)

    monkeypatch.setattr(F, "interpolate", without_backward)
    proof = prove_resize("cpu", SMALL)
    assert proof.holds
    assert "no antialiased bicubic" in proof.told


def test_what_the_device_cannot_do_at_all_is_a_failed_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_order(device: str, sizes: Sizes) -> Any:
        raise RuntimeError("MPS backend out of order\nmore")

    monkeypatch.setattr(proving, "PROVERS", {"gradients": out_of_order})
    ((name, proof),) = prove_all("cpu")
    assert name == "gradients"
    assert not proof.holds
    assert proof.told == "cpu fails (RuntimeError: MPS backend out of order)"
