"""How the steps of one job are computed: the planner's answer, and what a checkpoint keeps of it.

Enters: the planner's findings. Leaves: values for the loop, for the plan that the user sees, and for a
resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cliptune_model.choice import Choice
from cliptune_model.machine.policy import Policy
from cliptune_model.similarity import Similarity
from cliptune_trainer.losses import WHOLE
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.memory.plan import BatchPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How a step is computed.

    Attributes:
        policy: of the device.
        plan: of the batch.
        tiling: of the loss: "off", or the side of a tile.
        lean: which parts of the towers are replaced by leaner ones.
        choices: all, in the order that a person reads them.
        text_tokens: the longest that texts get.
        precision: "fp32", "bf16" or "fp16".
    """

    policy: Policy
    plan: BatchPlan
    tiling: Choice
    lean: Choice
    choices: tuple[Choice, ...]
    text_tokens: int
    precision: str

    def objective(self, config: LossConfig, similarity: Similarity) -> Objective:
        """What the job minimises, in whole tables or in tiles. On the CPU."""
        if self.tiling.value == WHOLE:
            return Objective(config)
        # The towers computed in it already: features in bf16 lose nothing that they still had.
        half = self.precision == "bf16" and similarity.half_products
        return Objective(config, block=int(self.tiling.value), products=torch.bfloat16 if half else None)

    def stored(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values: a resumed run computes as the one before."""
        plan = self.plan
        return {
            "device": self.policy.device.value.partition(":")[0],
            "precision": self.precision,
            "tiling": self.tiling.value,
            "micro_batch_size": plan.micro_batch_size,
            "checkpointing": plan.checkpointing,
            "attention": plan.attention,
            "block_bytes": plan.block_bytes,
            "estimated_bytes": plan.estimated_bytes,
        }
