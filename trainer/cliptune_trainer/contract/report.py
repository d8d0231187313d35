"""What came of trying out a user's own code: each promise with what was found.

Enters: promises, kept or not. Leaves: one `SpecError` that names all that were broken, or the `Choice` that
the plan shows. Made by `of_loss` and `of_similarity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cliptune.errors import CliptuneError, SpecError
from cliptune_model.choice import Choice


class BrokenPromiseError(Exception):
    """What was found instead of what was promised."""


@dataclass(kw_only=True, slots=True)
class Report:
    """The promises of one piece of code.

    Attributes:
        path: of the spec's field that names it.
        reference: what it is.
        role: "a loss" or "a similarity".
    """

    path: str
    reference: str
    role: str
    _kept: list[str] = field(default_factory=list)
    _broken: list[str] = field(default_factory=list)

    def check(self, promise: str, try_out: Callable[[], str]) -> bool:
        """Tries one out: it returns what there is to say of it, or raises. Whether the promise was kept."""
        try:
            found = try_out()
        except BrokenPromiseError as error:
            self._broken.append(f"{promise}: {error}")
        except Exception as error:  # anything may go wrong in a user's code
            why = (str(error).strip().splitlines() or [""])[0]
            self._broken.append(f"{promise}: it raises {type(error).__name__}: {why[:300]}")
        else:
            self._kept.append(f"{promise} ({found})" if found else promise)
            return True
        return False

    def choice(self, subject: str, origin: str) -> Choice:
        """The line of the plan.

        Raises:
            SpecError: a promise was broken; the message has a line for each.
        """
        if self._broken:
            raise self._error()
        return Choice(
            subject=subject, value=self.reference, reason=f"{origin}; tried out: {', '.join(self._kept)}"
        )

    def _error(self) -> CliptuneError:
        lines = "".join(f"\n  - {line}" for line in self._broken)
        kept = f"\nkept: {', '.join(self._kept)}" if self._kept else ""
        allowed = f"{self.role} as docs/your-own-loss.md describes it"
        return SpecError(
            f"{self.path}: {self.reference} is not {self.role} that can be trained with:{lines}{kept}",
            path=self.path,
            allowed=allowed,
        )


def finite(name: str, tensor: Tensor | None) -> None:
    """Raises `BrokenPromiseError` for NaN and infinity, and for nothing at all."""
    if tensor is None:
        raise BrokenPromiseError(f"{name} is missing")
    if not bool(torch.isfinite(tensor).all()):
        bad = tensor[~torch.isfinite(tensor)][0].item() if tensor.ndim else tensor.item()
        raise BrokenPromiseError(f"{name} holds {bad}")


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number expected."""
    largest = float(expected.detach().abs().max().clamp(min=1e-12))
    return float((found - expected).detach().abs().max()) / largest


def slope_error(
    value: Callable[[], Tensor], tensors: list[Tensor], generator: torch.Generator, *, step: float = 1e-6
) -> float:
    """How far the gradient of a scalar is from finite differences, along three random directions, in fp64.

    `value` reads `tensors`, which are leaves. The share is of the larger of both slopes, or of a tenth of the
    gradient's length where a direction happens to be flat.
    """
    gradients = torch.autograd.grad(value(), tensors, allow_unused=True)
    squares = [float(gradient.square().sum()) for gradient in gradients if gradient is not None]
    flat = max(0.1 * math.sqrt(sum(squares)), 1e-9)
    worst = 0.0
    for _ in range(3):
        directions = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in tensors]
        told = sum(
            float((gradient * direction).sum())
            for gradient, direction in zip(gradients, directions, strict=True)
            if gradient is not None
        )
        with torch.no_grad():
            ends = []
            for sign in (1.0, -1.0):
                for one, direction in zip(tensors, directions, strict=True):
                    one.add_(direction, alpha=sign * step)
                ends.append(float(value()))
                for one, direction in zip(tensors, directions, strict=True):
                    one.sub_(direction, alpha=sign * step)
        found = (ends[0] - ends[1]) / (2.0 * step)
        worst = max(worst, abs(told - found) / max(abs(told), abs(found), flat))
    return worst
