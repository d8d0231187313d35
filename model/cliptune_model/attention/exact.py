"""Scaled dot-product attention in blocks: exact, and with the memory of one block of scores.

Enters: what `torch.nn.functional.scaled_dot_product_attention` takes, and an `AttentionPlan`. Leaves: what it
returns, to rounding. Called by `cliptune_model.attention.hook`.

The method is that of Dao et al. 2022 (FlashAttention, section 3.1), without its tiling over keys, which an
image or a text never needs: the forward pass keeps queries, keys, values, the output and each row's
log-sum-exp; the backward pass makes the probabilities again, a block at a time. Slicing alone would save
nothing in training, for autograd would keep each slice's probabilities.

Shape suffixes: B batch, H heads, Q queries, K keys, D head dimension. A mask's may be 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cliptune_model.attention.plan import AttentionPlan, BlockShape, block_shape

_log: Final = logging.getLogger(__name__)

# The real one, whatever may be hooked later.
_native: Final[Callable[..., Tensor]] = F.scaled_dot_product_attention


def attention(
    plan: AttentionPlan,
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    value_BHKD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by this plan: [B, H, Q, D], stored token by token ([B, Q, H, D]).

    Dropout's masks are drawn block by block from one seed of the CPU's generator, so they are the same
    ones in the backward pass, and in a checkpoint's recomputation on every device.
    """
    why_not = _unsuited(query_BHQD, key_BHKD, value_BHKD, attn_mask, is_causal, enable_gqa)
    if plan.mode == "sdpa" or why_not:
        if plan.mode != "sdpa":
            _tell_once(why_not)
        return _native(
            query_BHQD,
            key_BHKD,
            value_BHKD,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    flat = query_BHQD.dim() == 3
    if flat:
        query_BHQD, key_BHKD, value_BHKD = (t.unsqueeze(1) for t in (query_BHQD, key_BHKD, value_BHKD))
        attn_mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    kind = query_BHQD.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and query_BHQD.dtype != torch.float64:
        half = torch.get_autocast_dtype(kind)
        query_BHQD, key_BHKD, value_BHKD = (t.to(half) for t in (query_BHQD, key_BHKD, value_BHKD))
    if attn_mask is not None:
        attn_mask = attn_mask.reshape(*(1,) * (4 - attn_mask.dim()), *attn_mask.shape)
    samples, heads, queries, width = query_BHQD.shape
    work = _Work(
        shape=block_shape(
            plan,
            samples=samples,
            heads=heads,
            queries=queries,
            keys=key_BHKD.shape[2],
            dtype=query_BHQD.dtype,
        ),
        scale=width**-0.5 if scale is None else scale,
        is_causal=is_causal,
        dropout_p=dropout_p,
        seed=int(torch.randint(2**62, ())) if dropout_p else 0,
    )
    with _in_own_precision(kind):
        out_BHQD: Tensor = _Blocks.apply(query_BHQD, key_BHKD, value_BHKD, attn_mask, work)
    return out_BHQD.squeeze(1) if flat else out_BHQD


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What both passes of one call share besides tensors."""

    shape: BlockShape
    scale: float
    is_causal: bool
    dropout_p: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Where a block lies: its samples and heads, which keys share, and its queries."""

    row: tuple[slice, slice]
    queries: slice
    number: int

    @property
    def at(self) -> tuple[slice, slice, slice]:
        return (*self.row, self.queries)


class _Blocks(torch.autograd.Function):
    """The two passes. Gradients flow to queries, keys, values and to a float mask."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, work: _Work) -> Tensor:
        out = _token_major(q, v.shape[-1])
        lse_BHQ1 = q.new_empty(*q.shape[:3], 1, dtype=_precise(q.dtype))
        for block in _cut(q, work.shape):
            scores = _scores(q, k, mask, block, work)
            # In place: a softmax would hold a second block. Rows that may see nothing give 0, as torch's do.
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            total = scores.sub_(top).exp_().sum(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).tiny)
            weights = scores.div_(total)
            if work.dropout_p:
                weights.mul_(_keep(weights, block, work))
            out[block.at] = weights.to(v.dtype) @ v[block.row]
            lse_BHQ1[block.at] = total.log_().add_(top)
        ctx.save_for_backward(q, k, v, mask, out, lse_BHQ1)
        ctx.work = work
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under a checkpoint, asking makes them again
        with _in_own_precision(grad.device.type):
            return _backward(saved, ctx.work, grad.to(saved[0].dtype), ctx.needs_input_grad)


def _backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    work: _Work,
    grad: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse_BHQ1 = saved
    dq, dk, dv = (_token_major(t, t.shape[-1]) for t in (q, k, v))
    precise = _precise(q.dtype)
    dmask = torch.zeros_like(mask, dtype=precise) if mask is not None and needed[3] else None
    parts = -(-q.shape[2] // work.shape.queries)
    for block in _cut(q, work.shape):
        first = block.queries.start == 0
        probabilities = _scores(q, k, mask, block, work).sub_(lse_BHQ1[block.at]).exp_()
        keep = _keep(probabilities, block, work) if work.dropout_p else None
        weights = probabilities if keep is None else probabilities * keep
        dv_part = weights.to(v.dtype).mT @ grad[block.at]
        del weights
        dscores = (grad[block.at] @ v[block.row].mT).to(precise)
        if keep is not None:
            dscores.mul_(keep)
            del keep
        inner = (grad[block.at].to(precise) * out[block.at]).sum(-1, keepdim=True)
        dscores.sub_(inner).mul_(probabilities)
        del probabilities
        if dmask is not None:
            where = _part(dmask, block)
            where += dscores.sum_to_size(where.shape)
        dscores = dscores.to(q.dtype)
        dq[block.at] = (dscores @ k[block.row]).mul_(work.scale)
        dk_part = (dscores.mT @ q[block.at]).mul_(work.scale)
        del dscores
        if parts == 1:
            dk[block.row], dv[block.row] = dk_part, dv_part
            continue
        # Sums over many blocks are kept in fp32, for the rows at hand only.
        if first:
            dk_row, dv_row = dk_part.to(precise), dv_part.to(precise)
        else:
            dk_row += dk_part
            dv_row += dv_part
        if block.queries.stop >= q.shape[2]:
            dk[block.row], dv[block.row] = dk_row, dv_row
    return dq, dk, dv, None if dmask is None or mask is None else dmask.to(mask.dtype), None


def _cut(q_BHQD: Tensor, shape: BlockShape) -> Iterator[_Block]:
    samples, heads, queries = q_BHQD.shape[:3]
    number = 0
    for b in range(0, samples, shape.samples):
        for h in range(0, heads, shape.heads):
            for i in range(0, queries, shape.queries):
                row = slice(b, b + shape.samples), slice(h, h + shape.heads)
                yield _Block(row=row, queries=slice(i, i + shape.queries), number=number)
                number += 1


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, block: _Block, work: _Work) -> Tensor:
    """[b, h, q, K] of one block, masked, at least in fp32. Scaled before the product: fp16 is short."""
    scores = ((q[block.at] * work.scale) @ k[block.row].mT).to(_precise(q.dtype))
    if work.is_causal:
        last = torch.arange(q.shape[2], device=q.device)[block.queries, None]
        scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > last, -torch.inf)
    if mask is not None:
        part = _part(mask, block)
        if part.dtype == torch.bool:
            scores.masked_fill_(~part, -torch.inf)
        else:
            scores.add_(part)
    return scores


def _part(mask: Tensor, block: _Block) -> Tensor:
    """What of a mask concerns a block; broadcast dimensions stay whole."""
    whole = slice(None)
    return mask[tuple(cut if size > 1 else whole for cut, size in zip(block.at, mask.shape[:3], strict=True))]


def _keep(like: Tensor, block: _Block, work: _Work) -> Tensor:
    """Dropout's factors of a block: 0, or 1 / (1 - p)."""
    if work.dropout_p >= 1.0:
        return torch.zeros_like(like)
    generator = torch.Generator(device=like.device).manual_seed(work.seed + block.number)
    keep = torch.empty_like(like).bernoulli_(1.0 - work.dropout_p, generator=generator)
    return keep.div_(1.0 - work.dropout_p)


def _token_major(like_BHLD: Tensor, width: int) -> Tensor:
    """Empty [B, H, L, width] in the order in which towers join the heads again: no copy there."""
    samples, heads, length = like_BHLD.shape[:3]
    return like_BHLD.new_empty(samples, length, heads, width).transpose(1, 2)


def _in_own_precision(device_type: str) -> AbstractContextManager[object]:
    """Products in the precision of their factors; meta tensors know no other."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unsuited(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> str:
    """Why this call goes to torch's own attention; empty: it need not."""
    if q.is_nested or k.is_nested or v.is_nested:
        return "nested tensors"
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        return "grouped queries"
    if q.dim() not in (3, 4) or q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1]:
        return f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if mask is not None and (is_causal or mask.dim() > q.dim()):
        return "a mask beside is_causal, or of more dimensions than the queries"
    if not q.is_floating_point():
        return f"type {q.dtype}"
    return ""


@cache
def _tell_once(why: str) -> None:
    _log.warning("attention with %s is left to torch's own kernel: it is not cut into blocks", why)
