"""The batch plan: how one batch goes through the towers within a memory budget, as fast as can be.

Enters: a budget, estimates of a step's bytes, and what the user and the device policy say. Leaves: ways to
compute the batch, the fastest first, and a `BatchPlan` of one of them. Called by preparation and by `run`.

There are three ways to save memory, and each costs time: to part the batch (all parts but one go forward
twice), to recompute activations (everything goes forward twice), to compute attention in blocks (where the
device would keep the scores). Which is cheapest depends on how small the parts would get: a device that gets
too little at once idles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cliptune_model.attention import AttentionPlan
from cliptune_model.choice import Choice
from cliptune_trainer.memory.estimate import Estimate

# A forward pass is a third of a step.
_STEP_PASSES: Final = 3.0
# Blocks of attention against torch's own where that keeps the scores: more, smaller products.
_BLOCKED: Final = 1.05
# Tokens at once at which a device reaches half of its speed, roughly: probes measure what it comes to.
_HALF_SPEED_TOKENS: Final = {"cuda": 2000, "mps": 400, "cpu": 50}
# Parts of one length are preferred, up to so many more of them: they need one compiled graph, not two.
_EVEN_PARTS: Final = 1.15


class DoesNotFitError(Exception):
    """No way to compute the batch keeps to the budget. `smallest` is the least that a step takes."""

    def __init__(self, smallest: Way, budget_bytes: int) -> None:
        super().__init__(f"{smallest.peak_bytes} bytes at least, {budget_bytes} are there")
        self.smallest, self.budget_bytes = smallest, budget_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is to be planned.

    Attributes:
        batch_size: pairs in the effective batch.
        budget_bytes: what a step may use, weights and optimizer state included.
        device_type: "cpu", "cuda" or "mps".
        tokens: of an image and a text together.
        loss_bytes: what features and loss of the whole batch take beside a part's activations.
        attentions: plans to choose among, the preferred one first.
        checkpointing: to choose among, the preferred one first.
        micro_batch_size: what the user fixed; None: as large as fits.
        max_micro_batch: what computes rightly on this device; None: any.
    """

    batch_size: int
    budget_bytes: int
    device_type: str
    tokens: int
    loss_bytes: int
    attentions: tuple[AttentionPlan, ...]
    checkpointing: tuple[bool, ...] = (False, True)
    micro_batch_size: int | None = None
    max_micro_batch: int | None = None

    @property
    def most(self) -> int:
        """The largest micro-batch that may be tried, whatever the memory."""
        return min(self.batch_size, self.max_micro_batch or self.batch_size, self.micro_batch_size or 2**31)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to compute the batch.

    Attributes:
        attention: as the towers compute it.
        checkpointing: activations are recomputed.
        estimate: bytes, by micro-batch; those of the loss are in it.
        micro_batch_size: pairs that go through the towers at once.
        cost: relative time of a pair; only the order counts.
    """

    attention: AttentionPlan
    checkpointing: bool
    estimate: Estimate
    micro_batch_size: int
    cost: float

    @property
    def peak_bytes(self) -> int:
        """Of a step."""
        return self.estimate.at(self.micro_batch_size)


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
        block_bytes: budget of one block's scores, for sliced and chunked attention.
    """

    micro_batch_size: int
    checkpointing: bool
    attention: str
    estimated_bytes: int
    budget_bytes: int
    source: str
    choices: tuple[Choice, ...]
    block_bytes: int

    @property
    def attention_plan(self) -> AttentionPlan:
        """For `cliptune_model.attention.install`."""
        return AttentionPlan(mode=self.attention, budget_bytes=self.block_bytes)


def ways(demand: Demand, estimate: Callable[[AttentionPlan, bool], Estimate]) -> list[Way]:
    """The ways that fit, the fastest first. No more is estimated than it takes to know the fastest.

    Raises:
        DoesNotFitError: there is none.
    """
    found: list[Way] = []
    smallest: Way | None = None
    for checkpointing in demand.checkpointing:
        for attention in demand.attentions:
            counted = estimate(attention, checkpointing)
            counted = Estimate(
                fixed_bytes=counted.fixed_bytes + demand.loss_bytes, pair_bytes=counted.pair_bytes
            )
            pairs = min(counted.pairs_within(demand.budget_bytes), demand.most)
            if demand.micro_batch_size is None:
                pairs = even_parts(demand.batch_size, pairs)
            elif pairs < demand.most:
                pairs = 0  # fixed by the user, and too much
            way = Way(
                attention=attention,
                checkpointing=checkpointing,
                estimate=counted,
                micro_batch_size=max(pairs, 1) if demand.micro_batch_size is None else demand.most,
                cost=cost(demand, max(pairs, 1), attention, checkpointing=checkpointing),
            )
            if smallest is None or way.peak_bytes < smallest.peak_bytes:
                smallest = way
            if pairs >= 1:
                found.append(way)
                if pairs == demand.batch_size:
                    return sorted(found, key=lambda way: way.cost)  # others only cost more
    if not found:
        if smallest is None:
            raise ValueError("nothing to choose among")
        raise DoesNotFitError(smallest, demand.budget_bytes)
    return sorted(found, key=lambda way: way.cost)


def cost(demand: Demand, pairs: int, attention: AttentionPlan, *, checkpointing: bool) -> float:
    """Relative time of a pair when `pairs` go through the towers at once."""
    at_once = pairs * demand.tokens
    speed = at_once / (at_once + _HALF_SPEED_TOKENS[demand.device_type])
    work = passes(demand.batch_size, pairs, checkpointing=checkpointing)
    return work * (1.0 if attention.mode == "sdpa" else _BLOCKED) / speed


def passes(batch_size: int, pairs: int, *, checkpointing: bool) -> float:
    """Forward passes that a pair's step amounts to, backward counted as two; recomputing included."""
    parts = -(-batch_size // pairs)
    return _STEP_PASSES + (parts - 1) / parts + float(checkpointing)


def even_parts(batch_size: int, most: int) -> int:
    """The micro-batch, at most `most`, that divides the batch into the fewest even parts; 0: `most` is."""
    if most < 1:
        return 0
    fewest = -(-batch_size // most)
    for parts in range(fewest, int(fewest * _EVEN_PARTS) + 1):
        if batch_size % parts == 0:
            return batch_size // parts
    return -(-batch_size // fewest)


def settle(demand: Demand, way: Way, others: Sequence[Way], *, source: str) -> BatchPlan:
    """The plan of one way, told against the others."""
    return BatchPlan(
        micro_batch_size=way.micro_batch_size,
        checkpointing=way.checkpointing,
        attention=way.attention.mode,
        estimated_bytes=way.peak_bytes,
        budget_bytes=demand.budget_bytes,
        source=source,
        block_bytes=way.attention.budget_bytes,
        choices=(
            Choice(
                subject="micro_batch_size",
                value=str(way.micro_batch_size),
                reason=_micro_batch_reason(demand, way, source),
            ),
            Choice(
                subject="checkpointing",
                value="on" if way.checkpointing else "off",
                reason=_checkpointing_reason(demand, way, others),
            ),
            Choice(
                subject="attention", value=way.attention.mode, reason=_attention_reason(demand, way, others)
            ),
        ),
    )


def _micro_batch_reason(demand: Demand, way: Way, source: str) -> str:
    told = f"{gib(way.peak_bytes)} of {gib(demand.budget_bytes)}, {source}"
    if demand.micro_batch_size is not None:
        return f"asked for: {told}"
    if way.micro_batch_size == demand.batch_size:
        return f"the whole batch fits: {told}"
    parts = -(-demand.batch_size // way.micro_batch_size)
    if demand.max_micro_batch and way.micro_batch_size >= demand.max_micro_batch:
        return f"larger ones are computed wrongly on this device: {parts} parts, {told}"
    whole = gib(way.estimate.at(demand.batch_size))
    return f"{whole} for the whole batch; in {parts} parts, with the same gradient, {told}"


def _checkpointing_reason(demand: Demand, way: Way, others: Sequence[Way]) -> str:
    if len(demand.checkpointing) == 1:
        return "asked for"
    if not way.checkpointing:
        return "the activations fit as they are"
    kept = [other for other in others if not other.checkpointing]
    if not kept:
        return "kept activations do not fit, not even of one pair"
    least = kept[0].micro_batch_size
    return f"kept activations leave room for {least} pairs at once: recomputing them takes less time"


def _attention_reason(demand: Demand, way: Way, others: Sequence[Way]) -> str:
    if len(demand.attentions) == 1:
        return "as asked for, or as the device has it"
    if way.attention.mode == "sdpa":
        return "torch's own is fastest where its scores fit"
    own = [other for other in others if other.attention.mode == "sdpa"]
    if not own:
        return "torch's own would keep scores that do not fit"
    return f"torch's own keeps all scores, which leaves room for {own[0].micro_batch_size} pairs at once"


def gib(size_bytes: float) -> str:
    """Bytes for a person."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**29 else f"{size_bytes / 2**20:.0f} MiB"
