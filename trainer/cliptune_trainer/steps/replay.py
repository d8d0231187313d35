"""The torch generators at one moment, so that a forward pass can be repeated with the same random masks.

Enters: a device. Leaves: a `RandomState` that puts the generators back. Called by the step, by accumulation
for each micro-batch and tower, and by checkpointing where torch forgets a generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomState:
    """What the CPU's generator was, and the device's own if it has one.

    Captured and restored on the host: all three kinds of generator keep their state there, so neither waits
    for the device. The CPU's belongs to every state, since some layers draw there whatever the device is
    (open_clip's patch dropout).
    """

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> Self:
        """The generators of this moment."""
        accelerator = None
        if device.type == "cuda":
            accelerator = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            accelerator = torch.mps.get_rng_state()
        return cls(device=device, cpu=torch.get_rng_state(), accelerator=accelerator)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        mine, theirs = (
            [None if state is None else state.numpy().tobytes() for state in (one.cpu, one.accelerator)]
            for one in (self, other)
        )
        return mine == theirs

    def restore(self) -> None:
        """Puts the generators back to the moment of `capture`."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.accelerator, self.device)
        else:
            torch.mps.set_rng_state(self.accelerator)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators go on from the captured moment; afterwards from where they were before."""
        now = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()
