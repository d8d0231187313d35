"""What is known of a loss beside its formula: its parameters, what it needs, whether it can be had in tiles.

Enters: a function. Leaves: a `LossEntry`. Made by the catalogue, and for users' own losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast

BIAS: Final = "bias"
LABELS: Final = "labels"
TEACHER: Final = "teacher"
NEGATIVE_CAPTIONS: Final = "negative_captions"
NEEDS: Final = (BIAS, LABELS, TEACHER, NEGATIVE_CAPTIONS)
"""What a loss can need beside features, scale and identities."""


class Parametrised(Protocol):
    """A loss whose parameters are not bound yet: `Contrast` and numbers by keyword → scalar."""

    def __call__(self, contrast: Contrast, /, **parameters: float) -> Tensor:
        """See `Loss`."""
        ...


class Tiled(Protocol):
    """A loss that never holds more than a few tiles of `block` x `block` logits; for linear similarities."""

    def __call__(
        self, contrast: Contrast, /, *, block: int, products: torch.dtype | None, **parameters: float
    ) -> Tensor:
        """As `Parametrised`. `products`: bf16 to multiply in bf16 on CUDA, whatever the features are in."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A number that a loss takes.

    Attributes:
        default: where it is not given.
        low, high: what it may be, both included.
        needs: of `NEEDS`, what the loss needs when it is not 0; "": nothing more.
        switch: it is 0 or 1 and nothing between.
    """

    default: float
    low: float
    high: float
    needs: str = ""
    switch: bool = False

    def allows(self, value: float) -> bool:
        """Whether it may be this; NaN never."""
        return value in (0.0, 1.0) if self.switch else self.low <= value <= self.high

    @property
    def allowed(self) -> str:
        """For a person."""
        return "0 or 1" if self.switch else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossEntry:
    """A loss.

    Attributes:
        function: takes a `Contrast`, and its parameters by keyword.
        told: in a few words, for lists.
        parameters: by name.
        needs: of `NEEDS`, whatever the parameters are.
        tiled: the same loss a tile at a time; None: it needs the whole table.
        tables: fp32 numbers a pair that the whole table takes at its peak: logits, what autograd keeps,
            gradients.
        below_zero: it may be negative, so that no weight of it can be learned.
        parts_repeats: rows that say the same are negatives of each other.
        robust: it has a robust form, for `loss.temperature` "global".
    """

    function: Parametrised
    told: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    tiled: Tiled | None = None
    tables: int = 8
    below_zero: bool = False
    parts_repeats: bool = False
    robust: bool = False
