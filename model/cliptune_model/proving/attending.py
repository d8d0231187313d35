"""Attention in every mode, as training and as inference call it.

Enters: a mode. Leaves: a prover of it, against torch's own in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cliptune_model.attention import AttentionPlan, install
from cliptune_model.machine.proofs import Proof
from cliptune_model.proving.compare import FP32_LIMIT, Sizes, churned, judged, relative, true_fp32, worst
from cliptune_model.proving.shapes import Piece, pieces

# Half precision rounds what a changed neighbour cannot touch at all.
_LEAK_LIMIT = 1e-3


def prove_attention(mode: str) -> Callable[[str, Sizes], Proof]:
    """The proof of "sdpa", "sliced" or "chunked"."""

    def prove(device: str, sizes: Sizes) -> Proof:
        plan = AttentionPlan(mode=mode, budget_bytes=sizes.block_bytes)
        differences = []
        for name in ("image block", "text block"):
            piece = pieces(sizes)[name]
            exact = piece.gradients("cpu", torch.float64)
            blocked = replace(piece, make=_with(piece.make, plan))
            with true_fp32(), churned(device):
                differences.append(worst(blocked.gradients(device, torch.float32), exact))
                differences.append(_inference_difference(blocked, exact["output"], device))
        difference = max(differences, key=lambda value: (value != value, value))
        what = f"{mode} attention on {device}, in training and inference, with and without a mask"
        proof = judged(difference, FP32_LIMIT, what)
        if not proof.holds:
            return proof
        text = pieces(sizes)["text block"]
        text = replace(text, make=_with(text.make, plan))
        half = torch.bfloat16 if device == "cpu" else torch.float16
        leak = leaked(text, device, half)
        if not leak <= _LEAK_LIMIT:
            told = f"{mode} attention on {device} in half precision: a token sees later ones ({leak:.1e})"
            return Proof(holds=False, told=told)
        return proof

    return prove


def leaked(piece: Piece, device: str, dtype: torch.dtype) -> float:
    """By how much the last token changes outputs of those before it, which a causal mask hides it from."""
    module = piece.module(device)
    changed_BLW = piece.x.clone()
    changed_BLW[:, -1] = -10.0 * piece.x[:, -1]
    with torch.no_grad(), torch.autocast(torch.device(device).type, dtype=dtype):
        before, after = (
            piece.call(module, x_BLW.to(device))[:, :-1].float() for x_BLW in (piece.x, changed_BLW)
        )
    return relative(after, before)


def _inference_difference(piece: Piece, exact: Tensor, device: str) -> float:
    module = piece.module(device).eval()
    with torch.inference_mode():
        return relative(piece.call(module, piece.x.to(device)), exact)


def _with(make: Callable[[], nn.Module], plan: AttentionPlan) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        module = make()
        install(module, plan)
        return module

    return made
