"""The batch plan: how a batch goes through the towers within a memory budget.

Enters: a budget and estimates. Leaves: a `BatchPlan`. Called by preparation and by `run`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cliptune_model.device import Choice


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """How one effective batch is computed.

    Attributes:
        micro_batch_size: pairs that go through the towers at once.
        checkpointing: activations are recomputed in the backward pass.
        attention: "sdpa", "sliced" or "chunked".
        estimated_bytes: peak of a step, weights and optimizer state included.
        budget_bytes: what the step may use.
        source: "estimated", "probed" or "cached".
        choices: the same with reasons, for the plan that the user sees.
    """

    micro_batch_size: int
    checkpointing: bool
    attention: str
    estimated_bytes: int
    budget_bytes: int
    source: str
    choices: tuple[Choice, ...]
