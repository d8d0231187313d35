"""When to save: the spec's `[checkpoint]`, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass

from cliptune.v1 import spec_pb2
from cliptune_trainer.spec.check import within


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save."""

    every_steps: int | None = None  # the end of every epoch
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            within("checkpoint.every_steps", self.every_steps, 1, 2**53)
        within("checkpoint.keep", self.keep, 1, 10_000)


def checkpoint_config(checkpoint: spec_pb2.CheckpointSpec) -> CheckpointConfig:
    """The typed form of `CheckpointSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    return CheckpointConfig(
        every_steps=checkpoint.every_steps if checkpoint.HasField("every_steps") else None,
        keep=checkpoint.keep if checkpoint.HasField("keep") else 2,
    )
