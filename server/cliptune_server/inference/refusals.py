"""What the engine has just refused is refused again without asking it, for a moment.

Enters: requests on their way to the engine, and its refusals for want of time or room. Leaves: the same
refusal for those that ask for no less. Used by `engines.py`. An overloaded engine must not spend its time on
saying so: at three times what it can do it would say it hundreds of times a second, and its heartbeats would
wait behind them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cliptune.errors import OverloadedError

_HOLD_S: Final = 0.05
"""What has become free since is not noticed for so long: much less than anybody waits there."""
_RETRY: Final = "retry_after_s"


class Measured(Protocol):
    """A message."""

    def ByteSize(self) -> int:  # noqa: N802
        """Bytes on the wire."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Refusal:
    size_bytes: int
    left_s: float
    until_s: float
    error: OverloadedError


class Refusals:
    """One engine's. Used on the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock: Final = clock
        self._last: Final[dict[tuple[str, bool], _Refusal]] = {}
        self.repeated = 0
        """Requests that were refused here."""

    def check(self, request: Measured, timeout_s: float | None, *, bulk: bool) -> None:
        """`OverloadedError` if a request of this kind that was no larger, and had no less time, has just been
        refused."""
        last = self._last.get((type(request).__name__, bulk))
        if last is None or self._clock() >= last.until_s:
            return
        if request.ByteSize() >= last.size_bytes and _left_s(timeout_s) <= last.left_s:
            self.repeated += 1
            raise OverloadedError(last.error.message, **last.error.metadata)

    def note(self, request: Measured, timeout_s: float | None, error: OverloadedError, *, bulk: bool) -> None:
        """The engine has refused this one."""
        if _RETRY not in error.metadata:  # want of memory for this very request, which is no other's
            return
        self._last[type(request).__name__, bulk] = _Refusal(
            size_bytes=request.ByteSize(),
            left_s=_left_s(timeout_s),
            until_s=self._clock() + _HOLD_S,
            error=error,
        )


def _left_s(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else timeout_s
