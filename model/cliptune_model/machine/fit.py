"""Precision, checkpointing, attention and micro-batch together: what of a step fits into the memory.

Enters: machine, wishes, workload, proofs and a budget. Leaves: the first `Fit`, going from exact and fast to
small, that leaves room for a useful micro-batch. Called by `policy.decide`. The bytes are rough: the
trainer's batch plan starts here, counts on the model itself, and confirms by probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cliptune.errors import InvalidInputError
from cliptune_model.choice import Choice
from cliptune_model.machine.hardware import GIB, Machine
from cliptune_model.machine.proofs import Proof, Proofs
from cliptune_model.machine.rules import (
    ATTENTIONS,
    PRECISIONS,
    SWITCHES,
    automatic_precisions,
    check_one_of,
    choose_attention,
    choose_precision,
)
from cliptune_model.machine.workload import Workload

# A micro-batch below this leaves the device idle: half precision, then recomputing, come before going lower.
_USEFUL_PAIRS: Final = {"mps": 24, "cuda": 24, "cpu": 4}
_MULTIPLE: Final = 8
# Live tensors against what the device holds: heaps, fragments, compiled graphs.
_OVERHEAD: Final = {"mps": 1.4, "cuda": 1.15, "cpu": 1.2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user asked for; the defaults leave everything open."""

    precision: str = "auto"
    attention: str = "auto"
    checkpointing: str = "auto"
    micro_batch_size: int | None = None
    compile: str = "auto"
    threads: int | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, ("auto", *PRECISIONS))
        check_one_of("attention", self.attention, ("auto", *ATTENTIONS))
        check_one_of("checkpointing", self.checkpointing, SWITCHES)
        check_one_of("compile", self.compile, SWITCHES)
        for name in ("micro_batch_size", "threads", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} = {value}: at least 1 is needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Precision, checkpointing, attention and the micro-batch that they leave room for."""

    precision: Choice
    checkpointing: Choice
    attention: Choice
    micro_batch_size: Choice


def fit(
    machine: Machine, wishes: Wishes, workload: Workload, proofs: Proofs, budget_bytes: int, cap: Choice
) -> Fit:
    """The first shape, from exact and fast to small, whose micro-batch is large enough to be useful."""
    if wishes.precision == "auto":
        precisions = automatic_precisions(machine, proofs)
    else:
        precisions = [choose_precision(wishes.precision, machine, proofs)]
    switches: list[Literal["off", "on"]] = ["off", "on"]
    broken = proofs.failed("checkpointing")
    if broken and wishes.checkpointing == "on":
        raise InvalidInputError(
            f"checkpointing 'on': cliptune doctor found it broken on this device ({broken.told}); use 'off'",
            allowed="auto, off",
        )
    if wishes.checkpointing != "auto" or broken:
        switches = ["on" if wishes.checkpointing == "on" else "off"]
    most = workload.batch_size if cap.value == "none" else min(workload.batch_size, int(cap.value))
    wanted = min(wishes.micro_batch_size or _USEFUL_PAIRS[machine.accelerator], most)
    smallest = 0
    shapes: list[tuple[int, Fit]] = []
    for switch in switches:
        for precision in precisions:
            recomputed = switch == "on"
            attention = choose_attention(
                wishes.attention, machine, workload.tokens, proofs, recomputed=recomputed
            )
            scores_kept = attention.value == "sdpa" and machine.accelerator == "mps"
            pair_bytes = workload.pair_bytes(
                precision.value, checkpointing=recomputed, scores_kept=scores_kept
            )
            room_bytes = max(budget_bytes - workload.state_bytes(), 0)
            pairs = int(room_bytes / (pair_bytes * _OVERHEAD[machine.accelerator]))
            smallest = smallest or pairs
            told = f"about {_mib(pair_bytes)} a pair in {gib(room_bytes)} beside the weights"
            shape = Fit(
                precision=precision,
                checkpointing=_checkpointing(wishes, switch, smallest, broken),
                attention=attention,
                micro_batch_size=_micro_batch(wishes, pairs, most, cap, told),
            )
            if pairs >= wanted:
                return shape
            shapes.append((pairs, shape))
    return max(shapes, key=lambda entry: entry[0])[1]


def _micro_batch(wishes: Wishes, pairs: int, most: int, cap: Choice, told: str) -> Choice:
    subject = "micro_batch_size"
    if wishes.micro_batch_size is not None:
        value = min(wishes.micro_batch_size, most)
        if value == wishes.micro_batch_size:
            return Choice(subject=subject, value=str(value), reason="asked for")
        reason = cap.reason if str(most) == cap.value else "the whole batch"
        return Choice(
            subject=subject, value=str(value), reason=f"{wishes.micro_batch_size} asked for; {reason}"
        )
    if pairs >= most:
        reason = cap.reason if str(most) == cap.value else f"the whole batch fits: {told}"
        return Choice(subject=subject, value=str(most), reason=reason)
    if pairs < 1:
        return Choice(subject=subject, value="1", reason=f"{told}: too little even for one by this estimate")
    value = pairs if pairs < _MULTIPLE else pairs // _MULTIPLE * _MULTIPLE
    return Choice(subject=subject, value=str(value), reason=told)


def _checkpointing(wishes: Wishes, switch: str, pairs_without: int, broken: Proof | None) -> Choice:
    if wishes.checkpointing != "auto":
        return Choice(subject="checkpointing", value=switch, reason="asked for")
    if broken:
        return Choice(subject="checkpointing", value="off", reason=f"doctor's proof failed: {broken.told}")
    reason = "the activations fit as they are"
    if switch == "on":
        reason = (
            f"kept activations leave room for {pairs_without} pairs at once, fewer than keep the device busy"
        )
    return Choice(subject="checkpointing", value=switch, reason=reason)


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB" if size_bytes >= 10 * 2**20 else f"{size_bytes / 2**20:.1f} MiB"


def gib(size_bytes: float) -> str:
    """Bytes for a person."""
    return f"{size_bytes / GIB:.1f} GiB"
