"""Which requests go first: the word, on its way across both transports.

Enters: what a caller says of its requests. Leaves: gRPC metadata, and its meaning at the other end. Used by
both clients, the daemon's two faces and its link to the engine; over REST it is the header `X-Priority`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

from cliptune.errors import InvalidInputError
from cliptune.tracing import Pair

Priority: TypeAlias = Literal["interactive", "bulk"]
METADATA_KEY: Final = "cliptune-priority"
HEADER: Final = "X-Priority"
BULK: Final = "bulk"
_ALLOWED: Final = ("interactive", BULK)


def check(value: str) -> bool:
    """Whether the word says bulk. `InvalidInputError` for any other than the two."""
    if value not in _ALLOWED:
        allowed = ", ".join(_ALLOWED)
        raise InvalidInputError(f"the priority is {value!r}; allowed: {allowed}", allowed=allowed)
    return value == BULK


def is_bulk(metadata: Iterable[Pair] | None, *, otherwise: bool = False) -> bool:
    """What gRPC metadata says; `otherwise` where it says nothing. `InvalidInputError`."""
    for key, value in metadata or ():
        if key == METADATA_KEY:
            return check(value if isinstance(value, str) else value.decode("latin-1"))
    return otherwise


def metadata(*, bulk: bool) -> tuple[Pair, ...]:
    """To be sent along; what is interactive says nothing."""
    return ((METADATA_KEY, BULK),) if bulk else ()


def chosen(value: Priority | None) -> tuple[Pair, ...]:
    """What a client sends along that was told a priority. `InvalidInputError` for an unknown one."""
    if value is None:
        return ()
    check(value)
    return ((METADATA_KEY, value),)
