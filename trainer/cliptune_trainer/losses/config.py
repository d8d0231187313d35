"""What to minimise, typed and checked: losses, their weights and parameters, the temperature.

Enters: names and numbers of a spec. Leaves: a `LossConfig`. A wrong value is a `SpecError` with its path,
what is allowed and, for a name, the nearest ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cliptune.errors import SpecError
from cliptune_model.nearest import nearest
from cliptune_trainer.losses.catalog import LOSSES, ROBUST_FORM
from cliptune_trainer.losses.choice import TILINGS
from cliptune_trainer.losses.entry import LossEntry
from cliptune_trainer.losses.named import loss_entry

FIXED: Final = "fixed"
UNCERTAINTY: Final = "uncertainty"
WEIGHTINGS: Final = (FIXED, UNCERTAINTY)
LEARNED: Final = "learned"
GLOBAL: Final = "global"
TEMPERATURES: Final = (LEARNED, FIXED, GLOBAL)
LARGEST_SCALE: Final = 10_000.0
LARGEST_WEIGHT: Final = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One loss of several.

    Attributes:
        name: of the catalogue, or a user's own.
        weight: of it, above 0.
        parameters: those that the spec names.
        path: of the message that it comes from, for errors.
    """

    name: str = "infonce"
    weight: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)
    path: str = "loss"

    def __post_init__(self) -> None:
        loss_entry(self.name, f"{self.path}.name")
        holds = 0.0 < self.weight <= LARGEST_WEIGHT
        _check(f"{self.path}.weight", self.weight, holds, f"above 0, at most {LARGEST_WEIGHT:g}")

    def entry(self, temperature: str = LEARNED) -> LossEntry:
        """The loss, in its robust form where the temperature is "global"."""
        entry = loss_entry(self.name, f"{self.path}.name")
        return ROBUST_FORM if temperature == GLOBAL and entry.robust else entry


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What to minimise: `terms`, added. See `LossSpec` in `spec.proto` for the rest."""

    terms: tuple[Term, ...] = field(default_factory=lambda: (Term(),))
    tiling: str = "auto"
    weighting: str = FIXED
    temperature: str = LEARNED
    logit_scale: float | None = None  # the model's
    max_logit_scale: float = 100.0
    matryoshka_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _one_of("loss.tiling", self.tiling, TILINGS)
        _one_of("loss.weighting", self.weighting, WEIGHTINGS)
        _one_of("loss.temperature", self.temperature, TEMPERATURES)
        path, most = "loss.max_logit_scale", self.max_logit_scale
        _check(path, most, 1.0 < most <= LARGEST_SCALE, f"above 1, at most {LARGEST_SCALE:g}")
        if self.logit_scale is not None:
            low = 0.0 if self.temperature == FIXED else 1.0
            holds = low <= self.logit_scale <= most and self.logit_scale > 0.0
            _check("loss.logit_scale", self.logit_scale, holds, f"{low:g} to loss.max_logit_scale, {most:g}")
        for place, dim in enumerate(self.matryoshka_dims):
            rising = dim > (self.matryoshka_dims[place - 1] if place else 0)
            allowed = "from 1 on, each larger than the one before"
            _check(f"loss.matryoshka_dims[{place}]", dim, rising, allowed)
        for term in self.terms:
            self._check_parameters(term)
        self._check_learned_weights()
        if self.temperature == GLOBAL and not any(term.entry(GLOBAL) is ROBUST_FORM for term in self.terms):
            names = ", ".join(name for name, entry in LOSSES.items() if entry.robust)
            allowed = f"learned, fixed; or global with {names}, alone or among loss.terms"
            raise _wrong("loss.temperature", f"'global' with {', '.join(self.names)}", allowed)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms."""
        return tuple(term.name for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """Of `entry.NEEDS`, what any of the terms needs, given its parameters."""
        found: set[str] = set()
        for term in self.terms:
            entry = term.entry(self.temperature)
            found |= entry.needs
            found |= {
                entry.parameters[name].needs
                for name, value in term.parameters.items()
                if value and entry.parameters[name].needs
            }
        return frozenset(found)

    @property
    def tables(self) -> int:
        """fp32 numbers a pair that all terms take together, each over each width, as `LossEntry.tables`."""
        widths = 1 + len(self.matryoshka_dims)
        return widths * sum(term.entry(self.temperature).tables for term in self.terms)

    @property
    def whole_only(self) -> str | None:
        """The first term that cannot be had in tiles; None: all can."""
        return next((term.name for term in self.terms if term.entry(self.temperature).tiled is None), None)

    def check_dimensions(self, embedding_dim: int) -> None:
        """Raises `SpecError` unless the Matryoshka dimensions are fewer than the embedding's."""
        for place, dim in enumerate(self.matryoshka_dims):
            allowed = f"fewer than the embedding's {embedding_dim}"
            _check(f"loss.matryoshka_dims[{place}]", dim, dim < embedding_dim, allowed)

    def _check_parameters(self, term: Term) -> None:
        entry = term.entry(self.temperature)
        for name, value in term.parameters.items():
            path = f"{term.path}.parameters.{name}"
            parameter = entry.parameters.get(name)
            if parameter is None:
                allowed = ", ".join(entry.parameters) or "none"
                message = f"{path} is no parameter of {term.name!r}{nearest(name, entry.parameters)}"
                raise SpecError(f"{message}; allowed: {allowed}", path=path, allowed=allowed)
            _check(path, value, parameter.allows(value), parameter.allowed)

    def _check_learned_weights(self) -> None:
        if self.weighting != UNCERTAINTY:
            return
        if len(self.terms) < 2:
            raise _wrong("loss.weighting", "'uncertainty' with one loss", "two loss.terms or more; or fixed")
        for term in self.terms:
            if term.entry(self.temperature).below_zero:
                allowed = f"fixed: {term.name!r} can fall below 0, and its learned weight would grow for ever"
                raise _wrong("loss.weighting", "'uncertainty'", allowed)


def _wrong(path: str, value: str, allowed: str) -> SpecError:
    return SpecError(f"{path} is {value}; allowed: {allowed}", path=path, allowed=allowed)


def _check(path: str, value: float, holds: bool, allowed: str) -> None:
    if not holds or not math.isfinite(value):
        raise _wrong(path, f"{value:g}", allowed)


def _one_of(path: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise _wrong(path, repr(value), ", ".join(allowed))
