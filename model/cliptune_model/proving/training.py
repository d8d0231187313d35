"""What surrounds the gradients of a step: half precision and its scaler, the optimiser, recomputation.

Enters: a device and `Sizes`. Leaves: `Proof`s against the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from cliptune_model.clip import build
from cliptune_model.machine.proofs import Proof
from cliptune_model.proving.compare import FP32_LIMIT, HALF_LIMIT, Sizes, judged, relative, worst
from cliptune_model.proving.model import PROBE_MODEL, exact_gradients, gradients

_HALF: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
_RATE: Final = 1e-2
_BETAS: Final = (0.9, 0.98)
_EPS: Final = 1e-6
_DECAY: Final = 0.1
_SCALE: Final = 4.0


def prove_half(name: str) -> Callable[[str, Sizes], Proof]:
    """The proof of "bf16" or "fp16": gradients of a whole model under autocast; fp16's scaler too."""

    def prove(device: str, sizes: Sizes) -> Proof:
        exact = exact_gradients()
        # Its own first scale, 65,536, overflows by design, and falls.
        scaler = GradScaler(torch.device(device).type, init_scale=256.0) if name == "fp16" else None
        found = gradients(
            build(PROBE_MODEL, device=device), device, torch.float32, half=_HALF[name], scaler=scaler
        )
        what = f"a whole model in {name} on {device} against float64 on the CPU"
        proof = judged(worst(found, exact), HALF_LIMIT, what)
        if not proof.holds or scaler is None:
            return proof
        if fault := overflow_fault(device, fused=False):
            return Proof(holds=False, told=f"the gradient scaler on {device}: {fault}")
        return Proof(holds=True, told=f"{proof.told}; the scaler skips an overflow")

    return prove


def prove_fused_optimizer(device: str, sizes: Sizes) -> Proof:
    """Three steps of fused AdamW against its definition; and the verdict on a step is obeyed."""
    difference = relative(_trained_fused(device), _trained_by_hand())
    proof = judged(difference, FP32_LIMIT, f"three steps of fused AdamW on {device}")
    if not proof.holds:
        return proof
    if fault := overflow_fault(device, fused=True):
        return Proof(holds=False, told=f"fused AdamW on {device}: {fault}")
    return Proof(holds=True, told=f"{proof.told}; an overflow is skipped")


def overflow_fault(device: str, *, fused: bool) -> str:
    """What the scaler and AdamW do wrongly around an overflow; empty: nothing."""
    weight = nn.Parameter(torch.ones(64, 64, device=device))
    optimizer = AdamW([weight], lr=_RATE, weight_decay=0.0, fused=fused)
    scaler = GradScaler(torch.device(device).type, init_scale=1024.0)
    for factor, changes in ((float("inf"), False), (1.0, True)):
        before, scale = weight.detach().clone(), scaler.get_scale()
        scaler.scale((weight * factor).sum()).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        moved = float((weight.detach() - before).abs().max())
        if not changes and moved != 0.0:
            return "a step was taken on a gradient that is not finite"
        if not changes and scaler.get_scale() >= scale:
            return "the loss scale did not fall after an overflow"
        # Adam's first step is the learning rate, whatever the gradient.
        if changes and abs(moved - _RATE) > 0.1 * _RATE:
            return f"the step after an overflow moved weights by {moved:.1e} instead of {_RATE:.1e}"
    return ""


def prove_checkpointing(device: str, sizes: Sizes) -> Proof:
    """Dropout recomputed in the backward pass from the device's own generator draws the same mask."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes.pairs * sizes.text_tokens, sizes.text_width, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Sequential(
            nn.Linear(sizes.text_width, sizes.text_width), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.5)
        )
    layer = layer.to(device).train()
    start = _generator_state(device)
    kept = _input_gradient(layer, x.to(device), recompute=False, device=device)
    _set_generator_state(device, start)
    recomputed = _input_gradient(layer, x.to(device), recompute=True, device=device)
    what = f"gradients through dropout, recomputed against kept, on {device}"
    return judged(relative(recomputed, kept), FP32_LIMIT, what)


def _input_gradient(layer: nn.Module, x: Tensor, *, recompute: bool, device: str) -> Tensor:
    x = x.clone().requires_grad_()
    if recompute:
        out = checkpoint(
            layer,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # torch knows nothing of Apple's generator
            context_fn=lambda: _recomputation(device),
        )
    else:
        out = layer(x)
    out.square().sum().backward()
    assert x.grad is not None
    return x.grad


def _recomputation(device: str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """(around the forward pass, around its repetition): the second draws what the first drew."""
    start = _generator_state(device)

    @contextmanager
    def replayed() -> Any:
        now = _generator_state(device)
        _set_generator_state(device, start)
        yield
        _set_generator_state(device, now)

    return nullcontext(), replayed()


def _generator_state(device: str) -> Tensor:
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if kind == "mps" else torch.get_rng_state()


def _set_generator_state(device: str, state: Tensor) -> None:
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif kind == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _gradients_given(count: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Weights to begin with, and gradients of so many steps."""
    generator = torch.Generator().manual_seed(0)
    start, *steps = (torch.randn(257, 33, generator=generator) for _ in range(1 + count))
    return start, steps


def _trained_by_hand() -> Tensor:
    """AdamW as Loshchilov & Hutter 2019, algorithm 2, in float64 on the CPU."""
    start, steps = _gradients_given()
    weight, first, second = start.double(), torch.zeros(()), torch.zeros(())
    for step, gradient in enumerate(steps, start=1):
        first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient.double()
        second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient.double().square()
        update = (first / (1 - _BETAS[0] ** step)) / ((second / (1 - _BETAS[1] ** step)).sqrt() + _EPS)
        weight = weight * (1 - _RATE * _DECAY) - _RATE * update
    return weight


def _trained_fused(device: str) -> Tensor:
    """The same by fused AdamW, as training calls it: loss scale and verdict handed over without reading them.

    A fourth step, of gradients that are not finite, is to be left out.
    """
    start, steps = _gradients_given()
    weight = nn.Parameter(start.to(device))
    optimizer: Any = AdamW([weight], lr=_RATE, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, fused=True)
    optimizer.grad_scale = torch.full((), _SCALE, device=device)
    for gradient, left_out in (*((step * _SCALE, 0.0) for step in steps), (start / 0.0, 1.0)):
        optimizer.found_inf = torch.full((), left_out, device=device)
        weight.grad = gradient.to(device)
        optimizer.step()
    return weight.detach()
