"""Batch plans that were settled before: by a job of the same kind, or by this job before its resume.

Enters: an entry of the plan cache, or what a checkpoint keeps. Leaves: a `BatchPlan`. Called by the planner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cliptune_model.attention import AttentionPlan
from cliptune_model.choice import Choice
from cliptune_trainer.memory.cache import CachedPlan
from cliptune_trainer.memory.estimate import Estimate
from cliptune_trainer.memory.plan import BatchPlan, Demand, Way, settle


def of_cache(demand: Demand, cached: CachedPlan) -> BatchPlan:
    """For the same demand as then."""
    pair_bytes = max(1, cached.estimated_bytes // cached.micro_batch_size)
    way = Way(
        attention=AttentionPlan(mode=cached.attention, budget_bytes=cached.block_bytes),
        checkpointing=cached.checkpointing,
        estimate=Estimate(
            fixed_bytes=cached.estimated_bytes - pair_bytes * cached.micro_batch_size, pair_bytes=pair_bytes
        ),
        micro_batch_size=cached.micro_batch_size,
        cost=0.0,
    )
    return settle(demand, way, [way], source="cached")


def of_checkpoint(stored: Mapping[str, Any], budget_bytes: int) -> BatchPlan:
    """`stored`: as `Execution.stored` made it. `budget_bytes`: today's."""
    reason = "as before the resume"
    return BatchPlan(
        micro_batch_size=int(stored["micro_batch_size"]),
        checkpointing=bool(stored["checkpointing"]),
        attention=stored["attention"],
        block_bytes=int(stored["block_bytes"]),
        estimated_bytes=int(stored["estimated_bytes"]),
        budget_bytes=budget_bytes,
        source="cached",
        choices=tuple(
            Choice(subject=subject, value=str(stored[subject]), reason=reason)
            for subject in ("micro_batch_size", "checkpointing", "attention")
        ),
    )
