"""Answers item by item: vectors of those that were embedded, errors of those that were not.

Enters: outcomes of single items. Leaves: `Rows`, and their errors as messages. Used by `inference.py`.

Shape suffixes: N items, D embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cliptune.errors import (
    CliptuneError,
    DeadlineExceededError,
    InternalError,
    UnavailableError,
    to_detail,
)
from cliptune.v1 import error_pb2

_log = logging.getLogger(__name__)

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """[N, D] features; a failed item's row is NaN and its error stands under its place."""

    vectors: Vector
    """[N, D] float32."""
    errors: Mapping[int, CliptuneError] = field(default_factory=dict)
    tokens: int = 0
    """Of texts, without padding."""

    @classmethod
    def of(cls, outcomes: Sequence[Vector | BaseException], dim: int, *, tokens: int = 0) -> Rows:
        """From one outcome an item. What ends the whole request is raised."""
        vectors_ND = np.full((len(outcomes), dim), np.nan, dtype=np.float32)
        errors: dict[int, CliptuneError] = {}
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, DeadlineExceededError | UnavailableError):
                raise outcome
            if isinstance(outcome, CliptuneError):
                errors[place] = outcome
            elif isinstance(outcome, Exception):
                _log.error("an item failed", exc_info=outcome)
                errors[place] = InternalError(f"the item failed: {type(outcome).__name__}: {outcome}")
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                vectors_ND[place] = outcome
        return cls(vectors=vectors_ND, errors=errors, tokens=tokens)

    def raise_single(self) -> None:
        """An error is the whole request's when its field holds a single item."""
        if len(self.vectors) == 1:
            raise_single(self.errors, 1)


def raise_single(errors: Mapping[int, CliptuneError], count: int) -> None:
    """Raises the error of a field's only item."""
    if count == 1 and errors:
        raise errors[0]


def item_errors(field_name: str, errors: Mapping[int, CliptuneError]) -> list[error_pb2.ItemError]:
    """As messages, in the order of the items."""
    return [
        error_pb2.ItemError(field=field_name, index=place, error=to_detail(error))
        for place, error in sorted(errors.items())
    ]
