"""Checks of a spec's fields, and the error that they raise.

Enters: a field's path, its value and what it may be. Leaves: nothing, or a `SpecError` that names all three.
Called by the parts of `spec`, and wherever a field turns out wrong once the data or the model is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cliptune.errors import SpecError


def wrong(path: str, value: str, allowed: str) -> SpecError:
    """The error for a field of the spec: its path, what it is, and what it may be."""
    return SpecError(f"{path} is {value}; allowed: {allowed}", path=path, allowed=allowed)


def one_of(path: str, value: str, allowed: Sequence[str]) -> None:
    """Raises `SpecError` unless the value is one of the allowed."""
    if value not in allowed:
        raise wrong(path, repr(value), ", ".join(allowed))


def within(path: str, value: float, low: float, high: float) -> None:
    """Raises `SpecError` unless the value lies within the bounds; NaN never does."""
    if not low <= value <= high:
        bounds = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
        raise wrong(path, f"{value:g}", bounds)
