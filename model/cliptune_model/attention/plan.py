"""How attention is cut into blocks, from a memory budget and the lengths at hand.

Enters: an `AttentionPlan` and the shape of one attention call. Leaves: a `BlockShape`. Pure arithmetic;
called by `cliptune_model.attention.exact` each time, for sequence lengths vary.

    sdpa      torch's own: whatever kernel the device has (on Apple's GPU in training: the whole matrix)
    sliced    whole rows of batch x heads, all queries of each: few, large products
    chunked   blocks of queries, of as many rows as fit: for sequences of which even one head is too much
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from cliptune.errors import InvalidInputError

MODES: Final = ("sdpa", "sliced", "chunked")
DEFAULT_BUDGET_BYTES: Final = 256 << 20

# Bytes that are alive a score at the worst moment of the backward pass, which is `exact`'s inner loop: the
# probabilities and their gradient, in fp32 beside their half-precision copies.
_BYTES_A_SCORE: Final = {torch.float64: 16, torch.float32: 8, torch.float16: 10, torch.bfloat16: 10}

# Fewer queries a block than this leave matrix units idle; more heads at once are taken only beyond it.
_LEAST_QUERIES: Final = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """How a model computes attention.

    Attributes:
        mode: "sdpa", "sliced" or "chunked".
        budget_bytes: what all score-sized tensors of one block may take together. "sliced" takes one head of
            one sample even where that is more; "chunked" one query of it.

    Raises:
        InvalidInputError: an unknown mode, or no budget.
    """

    mode: str
    budget_bytes: int = DEFAULT_BUDGET_BYTES

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInputError(f"attention is {self.mode!r}; allowed: {', '.join(MODES)}")
        if self.budget_bytes < 1:
            raise InvalidInputError(
                f"the attention's budget is {self.budget_bytes} bytes; at least 1 is needed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """One block: `queries` of each of `heads` heads of `samples` samples. Below all heads: one sample."""

    samples: int
    heads: int
    queries: int


def block_shape(
    plan: AttentionPlan,
    *,
    samples: int,
    heads: int,
    queries: int,
    keys: int,
    dtype: torch.dtype = torch.float32,
) -> BlockShape:
    """The largest blocks of a [samples, heads, queries, keys] score tensor that keep to the plan's budget.

    Blocks are even, so that a device which compiles a kernel for each shape sees two shapes at most.
    """
    room = plan.budget_bytes // max(1, keys * bytes_a_score(dtype))  # in queries, over all rows
    step = queries
    if plan.mode == "chunked":
        step = _even(queries, max(min(room, _LEAST_QUERIES), room // max(1, samples * heads)))
    rows = room // max(1, step)
    if rows >= heads:
        return BlockShape(samples=_even(samples, rows // max(1, heads)), heads=max(1, heads), queries=step)
    return BlockShape(samples=1, heads=_even(heads, rows), queries=step)


def bytes_a_score(dtype: torch.dtype) -> int:
    """Bytes alive a score of queries, keys and values of this type."""
    return _BYTES_A_SCORE.get(dtype, 16)


def _even(total: int, most: int) -> int:
    """The step that cuts `total` into the fewest parts of at most `most` (at least 1), nearly equal ones."""
    parts = -(-total // max(1, min(total, most)))
    return max(1, -(-total // max(1, parts)))
