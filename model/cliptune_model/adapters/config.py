"""What an adapter is made of: kind, rank, dropout, and the layers that get one.

Enters: plain values, from a spec or an adapter's file. Leaves: an `AdapterConfig`. Used throughout this
package, and by the trainer's spec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from cliptune.errors import SpecError

LORA: Final = "lora"
BOTTLENECK: Final = "bottleneck"
KINDS: Final = (LORA, BOTTLENECK)
# Attention's query, key, value and output; both layers of an MLP; 1 × 1 convolutions.
TARGETS: Final = ("q", "k", "v", "o", "mlp", "pointwise")
# What a bottleneck may follow: layers that end in the width of the tower.
BOTTLENECK_TARGETS: Final = ("o", "mlp")
MAX_RANK: Final = 1024
_PATH: Final = "adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """An adapter, before it meets a model.

    Attributes:
        kind: "lora": y = W x + (alpha / rank) B A x (Hu et al. 2021, section 4.1). "bottleneck":
            y' = y + U gelu(D y) (Houlsby et al. 2019, section 2.1).
        rank: rows of A; width of a bottleneck.
        alpha: of LoRA.
        dropout: of what enters A or D, while training.
        targets: of `TARGETS`. Empty: all that the model has.

    Raises:
        SpecError: a value out of range.
    """

    kind: str = LORA
    rank: int = 2
    alpha: float = 1.0
    dropout: float = 0.25
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("kind", repr(self.kind), self.kind in KINDS, ", ".join(KINDS))
        _check("rank", str(self.rank), 1 <= self.rank <= MAX_RANK, f"1 to {MAX_RANK}")
        held = math.isfinite(self.alpha) and self.alpha > 0
        _check("alpha", f"{self.alpha:g}", held, "above 0")
        _check("dropout", f"{self.dropout:g}", 0.0 <= self.dropout < 1.0, "0 to 1, 1 itself not")
        allowed = TARGETS if self.kind == LORA else BOTTLENECK_TARGETS
        for place, target in enumerate(self.targets):
            _check(f"targets[{place}]", repr(target), target in allowed, ", ".join(allowed))

    @property
    def scale(self) -> float:
        """By which LoRA's product is multiplied."""
        return self.alpha / self.rank

    @property
    def mergeable(self) -> bool:
        """It is linear in what enters it, so that it can become part of the weights."""
        return self.kind == LORA


def _check(name: str, value: str, holds: bool, allowed: str) -> None:
    if not holds:
        path = f"{_PATH}.{name}"
        raise SpecError(f"{path} is {value}; allowed: {allowed}", path=path, allowed=allowed)
