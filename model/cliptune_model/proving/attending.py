"""Attention in every mode, as training and as inference call it.

Enters: a mode. Leaves: a prover of it, against torch's own in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from cliptune_model.attention import AttentionPlan, install
from cliptune_model.proofs import Proof
from cliptune_model.proving.compare import FP32_LIMIT, Sizes, churned, judged, relative, true_fp32, worst
from cliptune_model.proving.shapes import Piece, causal_mask, pieces

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
            blocked = Piece(module=_with(piece.module, plan), x=piece.x, call=piece.call)
            with true_fp32(), churned(device):
                differences.append(worst(blocked.gradients(device, torch.float32), exact))
                differences.append(_inference_difference(blocked, exact["output"], device))
        difference = max(differences, key=lambda value: (value != value, value))
        what = f"{mode} attention on {device}, in training and inference, with and without a mask"
        proof = judged(difference, FP32_LIMIT, what)
        if not proof.holds:
            return proof
        text = pieces(sizes)["text block"]
        half = torch.bfloat16 if device == "cpu" else torch.float16
        leak = leaked(_with(text.module, plan), text.x, device, half)
        if not leak <= _LEAK_LIMIT:
            told = f"{mode} attention on {device} in half precision: a token sees later ones ({leak:.1e})"
            return Proof(holds=False, told=told)
        return proof

    return prove


def leaked(block: nn.Module, x_BLW: Tensor, device: str, dtype: torch.dtype) -> float:
    """By how much the last token changes outputs of those before it, which a causal mask hides it from."""
    block = deepcopy(block).to(device)
    changed_BLW = x_BLW.clone()
    changed_BLW[:, -1] = -10.0 * x_BLW[:, -1]
    mask = causal_mask(x_BLW.shape[1]).to(device)
    with torch.no_grad(), torch.autocast(torch.device(device).type, dtype=dtype):
        before, after = (block(x.to(device), attn_mask=mask)[:, :-1].float() for x in (x_BLW, changed_BLW))
    return relative(after, before)


def _inference_difference(piece: Piece, exact: Tensor, device: str) -> float:
    module = deepcopy(piece.module).to(device).eval()
    with torch.inference_mode():
        return relative(piece.call(module, piece.x.to(device)), exact)


def _with(module: nn.Module, plan: AttentionPlan) -> nn.Module:
    module = deepcopy(module)
    install(module, plan)
    return module
