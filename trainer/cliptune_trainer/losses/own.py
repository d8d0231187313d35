"""Users' own losses: what they declare, and how they become entries like the others.

Enters: "NAME" of an entry point in the group `cliptune.losses`, or "FILE.py:NAME". Leaves: a `LossEntry`.
Called where a loss is looked up by its name. A user's loss is a pure function of a `Contrast`; its
parameters are keyword arguments with a number as default:

    @declares(ranges={"sharpness": (0.0, 10.0)}, below_zero=False)
    def my_loss(contrast: Contrast, *, sharpness: float = 1.0) -> Tensor: ...

`cliptune_trainer.contract` tries it out before the job waits for a device.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from cliptune.errors import SpecError
from cliptune_model import own_code
from cliptune_model.own_code import OwnCode
from cliptune_trainer.losses.entry import NEEDS, LossEntry, Parameter, Parametrised

GROUP: Final = "cliptune.losses"
_ATTRIBUTE: Final = "__cliptune_loss__"
# Tables of N x N that an undeclared loss is thought to hold at its peak.
_TABLES: Final = 12
_FORM: Final = "a function (contrast, *, NAME: float = DEFAULT, ...) that returns a scalar tensor"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """What a function's text does not say of a loss. See `declares`."""

    needs: frozenset[str] = frozenset()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tables: int = _TABLES
    below_zero: bool = True
    stops_gradient: bool = False


def declares(
    *,
    needs: Iterable[str] = (),
    ranges: Mapping[str, tuple[float, float]] | None = None,
    tables: int = _TABLES,
    below_zero: bool = True,
    stops_gradient: bool = False,
) -> Callable[[Function], Function]:
    """Says of a loss what cannot be read off it. Without it the defaults hold.

    Args:
        needs: of "bias", "labels", "teacher", "negative_captions": what it reads of the contrast that is not
            always there. A job without them is refused.
        ranges: lowest and highest value of parameters; others may be any finite number.
        tables: fp32 numbers a pair that it takes at its peak: logits, what autograd keeps, gradients.
        below_zero: it may be negative; such a loss takes no part in `loss.weighting` = "uncertainty".
        stops_gradient: it treats a part of itself as a constant on purpose (weights of hard negatives,
        say), so
            that its gradient is not that of its value.
    """
    declaration = Declaration(
        needs=frozenset(needs),
        ranges=dict(ranges or {}),
        tables=tables,
        below_zero=below_zero,
        stops_gradient=stops_gradient,
    )

    def declare(function: Function) -> Function:
        setattr(function, _ATTRIBUTE, declaration)
        return function

    return declare


def declaration_of(function: Callable[..., Any]) -> Declaration:
    """What was declared, or the defaults."""
    return cast(Declaration, getattr(function, _ATTRIBUTE, Declaration()))


def names() -> list[str]:
    """Losses that are installed as entry points."""
    return own_code.names(GROUP)


def own_loss(name: str, path: str) -> OwnCode | None:
    """Where a loss comes from that cliptune does not bring; None: nobody brings it.

    Raises:
        SpecError, PathOutsideRootsError: as `own_code.find`.
    """
    return own_code.find(GROUP, name, path=path)


def own_entry(name: str, path: str) -> LossEntry | None:
    """A user's own loss as an entry; None: nobody brings it. The same one for as long as the process lives.

    Raises:
        SpecError: the code does not load, or is no loss by its signature or declaration.
        PathOutsideRootsError: a file whose code may not be run.
    """
    return _entry(name, path, own_code.code_folders())


@functools.cache
def _entry(name: str, path: str, folders: tuple[Path, ...]) -> LossEntry | None:
    own = own_loss(name, path)
    if own is None:
        return None
    declaration = declaration_of(own.value)
    unknown = sorted(declaration.needs - set(NEEDS))
    if unknown:
        raise _no_loss(path, own, f"declares a need of {', '.join(unknown)}", f"needs of {', '.join(NEEDS)}")
    return LossEntry(
        function=cast(Parametrised, own.value),
        told=own.origin,
        parameters=_parameters(own, declaration, path),
        needs=declaration.needs,
        tables=declaration.tables,
        below_zero=declaration.below_zero,
    )


def _parameters(own: OwnCode, declaration: Declaration, path: str) -> dict[str, Parameter]:
    try:
        first, *others = inspect.signature(own.value).parameters.values()
    except (TypeError, ValueError) as error:
        raise _no_loss(path, own, "cannot be called with a contrast", _FORM) from error
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise _no_loss(path, own, "takes no contrast as its first argument", _FORM)
    parameters = {}
    for other in others:
        default = other.default
        usable = isinstance(default, int | float) and not isinstance(default, bool) and math.isfinite(default)
        if other.kind is not other.KEYWORD_ONLY or not usable:
            raise _no_loss(path, own, f"has an argument {other.name!r} that is no number by keyword", _FORM)
        low, high = declaration.ranges.get(other.name, (-math.inf, math.inf))
        parameters[other.name] = Parameter(default=float(default), low=low, high=high)
    strange = sorted(declaration.ranges.keys() - parameters.keys())
    if strange:
        raise _no_loss(path, own, f"declares a range of {strange[0]!r}, which it does not take", _FORM)
    return parameters


def _no_loss(path: str, own: OwnCode, why: str, allowed: str) -> SpecError:
    return SpecError(f"{path}: {own.reference} {why}; allowed: {allowed}", path=path, allowed=allowed)
