"""How much the engine takes in before it says no.

Enters: the items and bytes of a request. Leaves: room for them until the request is answered, or an error
that says when to come back. Asked by the engine's servicer before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cliptune.errors import InvalidInputError, OverloadedError, RequestTooLargeError
from cliptune_server.engine.expectation import Expected

_BULK_PART: Final = 0.75
# Of a caller's time so much may go by in queues. A queue need not be longer to keep the device busy, and one
# that is as long as the callers' patience answers nobody in time as soon as it is a little slower than usual:
# where batches took ±30 % of what was expected, 0.75 answered 1 % after the deadline, 0.6 none of them.
_QUEUE_PART: Final = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    """Bounds of one request and of all together."""

    request_items: int = 4096
    """In each field of a request."""
    request_prompts: int = 131_072
    """Of all classes of a request: ImageNet's 1,000 classes by 80 templates are 80,000."""
    total_items: int = 16_384
    total_bytes: int = 512 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("request_items", "request_prompts", "total_items", "total_bytes"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"admission: {name} must be at least 1, not {getattr(self, name)}")


class Admission:
    """Counts what is inside."""

    def __init__(self, limits: AdmissionLimits, backlog_s: Callable[[], float]) -> None:
        self.limits = limits
        self._backlog_s = backlog_s
        self.items = 0
        self.bytes = 0
        self.shed = 0
        """Requests that were refused for want of room or of time."""

    def check_count(self, field: str, count: int, limit: int | None = None) -> None:
        """`RequestTooLargeError` when a field of a request holds more than `limit` items."""
        limit = self.limits.request_items if limit is None else limit
        if count > limit:
            raise RequestTooLargeError(
                f"the request holds {count:,} {field}; at most {limit:,} are taken at a time",
                field=field,
                limit=limit,
            )

    def check_time(self, expected: Expected, left_s: float) -> None:
        """`OverloadedError` when an answer is not to be expected within the `left_s` that a caller has.

        Said before anything is decoded: work for an answer that nobody gets is taken from all others. Whoever
        comes alone is let in: what its kind takes may have been measured too high, and is measured again.
        """
        needed_s = expected.own_s + expected.wait_s / _QUEUE_PART
        if expected.wait_s > 0 and needed_s > left_s:
            self.shed += 1
            raise OverloadedError(
                f"about {expected.wait_s:.1f} s of work are waiting, the request takes {expected.own_s:.1f} s"
                f" itself, and its caller has {max(left_s, 0):.1f} s",
                retry_after_s=f"{max(0.1, needed_s - left_s):.1f}",
            )

    @contextmanager
    def room(self, items: int, size_bytes: int, *, bulk: bool = False) -> Iterator[None]:
        """Holds room for a request; the last quarter is kept from what is bulk.

        `OverloadedError` when there is none; an empty engine takes any request.
        """
        part = _BULK_PART if bulk else 1.0
        full = (
            self.items + items > part * self.limits.total_items
            or self.bytes + size_bytes > part * self.limits.total_bytes
        )
        if full and self.items:
            self.shed += 1
            raise OverloadedError(
                f"the engine has {self.items:,} items ({self.bytes / 2**20:.0f} MiB) to answer first",
                retry_after_s=f"{max(0.1, self._backlog_s()):.1f}",
            )
        self.items += items
        self.bytes += size_bytes
        try:
            yield
        finally:
            self.items -= items
            self.bytes -= size_bytes
