"""How a machine trains: every automatic choice in one place, each with its reason.

Enters: a `Machine`, what the user wishes, the workload, and what `cliptune doctor` proved. Leaves: a
`Policy`. Called by the trainer, whose batch plan starts from it, and by doctor. Pure: nothing is measured
here, so the policy of every machine can be looked at on any.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cliptune_model.choice import Choice
from cliptune_model.machine.fit import Wishes, fit, gib
from cliptune_model.machine.hardware import Machine
from cliptune_model.machine.process import prepare_process
from cliptune_model.machine.proofs import UNKNOWN, Proofs
from cliptune_model.machine.rules import (
    ATTENTIONS,
    choose_compile,
    choose_fused_optimizer,
    choose_memory_format,
    choose_pin_memory,
    choose_threads,
    longest_sum,
)
from cliptune_model.machine.workload import Tower, Workload

__all__ = ["Policy", "Proofs", "Tower", "Wishes", "Workload", "decide", "prepare_process"]

# The rest is for the driver, other processes and libraries.
_CUDA_SHARE: Final = 0.9
_CPU_SHARE: Final = 0.75
_MIN_BLOCK_BYTES: Final = 64 * 2**20
_MAX_BLOCK_BYTES: Final = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The choices, and their values with their types."""

    device: Choice
    precision: Choice
    attention: Choice
    checkpointing: Choice
    micro_batch_size: Choice  # where the batch plan begins
    max_micro_batch: Choice  # what it may not exceed; "none"
    memory_budget: Choice  # bytes
    watermarks: Choice
    fused_optimizer: Choice
    compile: Choice
    threads: Choice
    pin_memory: Choice
    memory_format: Choice
    longest_sum: Choice  # rows that one product may reduce over; "any"
    attentions: tuple[str, ...]  # modes that the batch plan may take instead
    may_recompute: bool  # the batch plan may turn checkpointing on

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All, in the order that a person reads them."""
        return (
            self.device,
            self.precision,
            self.memory_budget,
            self.micro_batch_size,
            self.max_micro_batch,
            self.checkpointing,
            self.attention,
            self.longest_sum,
            self.fused_optimizer,
            self.compile,
            self.memory_format,
            self.pin_memory,
            self.threads,
            self.watermarks,
        )

    @property
    def recomputes(self) -> bool:
        """Checkpointing is on."""
        return self.checkpointing.value == "on"

    @property
    def start_pairs(self) -> int:
        """The micro-batch that the batch plan begins with."""
        return int(self.micro_batch_size.value)

    @property
    def max_pairs(self) -> int | None:
        """The largest micro-batch that is computed rightly; None: any."""
        return None if self.max_micro_batch.value == "none" else int(self.max_micro_batch.value)

    @property
    def budget_bytes(self) -> int:
        """What the step may use on the device."""
        return int(self.memory_budget.value)

    @property
    def block_bytes(self) -> int:
        """Budget of one block's score-sized tensors, for sliced and chunked attention."""
        return min(max(self.budget_bytes // 32, _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES)

    @property
    def max_reduction(self) -> int | None:
        """Rows that one product may reduce over; None: any."""
        return None if self.longest_sum.value == "any" else int(self.longest_sum.value)

    @property
    def fuses(self) -> bool:
        """The optimiser is fused."""
        return self.fused_optimizer.value == "on"

    @property
    def compiles(self) -> bool:
        """The towers are compiled."""
        return self.compile.value == "on"

    @property
    def pins_memory(self) -> bool:
        """Batches wait for the device in pinned memory."""
        return self.pin_memory.value == "on"

    @property
    def thread_count(self) -> int:
        """CPU threads."""
        return int(self.threads.value)


def decide(
    machine: Machine,
    device: Choice,
    wishes: Wishes,
    workload: Workload,
    proofs: Proofs = UNKNOWN,
    *,
    free_bytes: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Policy:
    """Every choice for this workload on this device.

    Args:
        machine: from `hardware.detect(device.value)`.
        device: from `device.choose_device`.
        wishes: what the user asked for.
        workload: the step.
        proofs: of doctor.
        free_bytes: what the device has free at this moment; None: the machine's own size decides.
        environment: of the process; limits of Apple's allocator that were set there are kept to.

    Raises:
        InvalidInputError: a precision that the device lacks, or that doctor found broken, with the way out.
    """
    marks = prepare_process(machine.accelerator, machine, dict(environment))
    budget = _memory_budget(machine, wishes, free_bytes, marks)
    limit = longest_sum(machine, proofs)
    cap = _max_micro_batch(limit, workload)
    shape = fit(machine, wishes, workload, proofs, int(budget.value), cap)
    scaled = shape.precision.value == "fp16"
    return Policy(
        device=device,
        precision=shape.precision,
        attention=shape.attention,
        checkpointing=shape.checkpointing,
        micro_batch_size=shape.micro_batch_size,
        max_micro_batch=cap,
        memory_budget=budget,
        watermarks=marks,
        fused_optimizer=choose_fused_optimizer(machine, proofs, scaled=scaled),
        compile=choose_compile(wishes.compile, machine, total_steps=workload.total_steps),
        threads=choose_threads(wishes.threads, machine),
        pin_memory=choose_pin_memory(machine),
        memory_format=choose_memory_format(machine),
        longest_sum=limit,
        attentions=_attentions(wishes, proofs),
        may_recompute=wishes.checkpointing != "off" and proofs.failed("checkpointing") is None,
    )


def _attentions(wishes: Wishes, proofs: Proofs) -> tuple[str, ...]:
    if wishes.attention != "auto":
        return (wishes.attention,)
    return tuple(mode for mode in ATTENTIONS if not proofs.failed(f"{mode} attention"))


def _max_micro_batch(limit: Choice, workload: Workload) -> Choice:
    if limit.value == "any":
        return Choice(subject="max_micro_batch", value="none", reason="only memory limits it")
    pairs = max(1, int(limit.value) // workload.tokens)
    reason = (
        f"{workload.tokens} tokens a pair: weight gradients sum at most {int(limit.value):,} rows rightly"
    )
    return Choice(subject="max_micro_batch", value=str(pairs), reason=reason)


def _memory_budget(machine: Machine, wishes: Wishes, free_bytes: int | None, marks: Choice) -> Choice:
    if machine.accelerator == "mps":
        # No limit to torch, 0, would still be one to the Mac.
        share = min(float(marks.value.partition("/")[0]) or 1.0, 1.0)
        whole, what = machine.gpu_memory_bytes, "what Metal recommends to use"
    elif machine.accelerator == "cuda":
        share, whole, what = _CUDA_SHARE, machine.gpu_memory_bytes, "the GPU's memory"
    else:
        share, whole, what = _CPU_SHARE, machine.memory_bytes, "the memory"
        what += " that the container leaves" if machine.container else ""
    wanted_bytes = wishes.memory_bytes
    if wanted_bytes is not None and wanted_bytes <= whole:
        return Choice(subject="memory_budget", value=str(wanted_bytes), reason="asked for")
    if wanted_bytes is not None:
        what = f"{what} ({gib(wanted_bytes)} were asked for)"
    budget_bytes = int(whole * share)
    if free_bytes is not None and free_bytes * share < budget_bytes:
        budget_bytes, what, whole = int(free_bytes * share), f"what is free of {what}", free_bytes
    return Choice(
        subject="memory_budget", value=str(budget_bytes), reason=f"{share:.0%} of {what}, {gib(whole)}"
    )
