"""Something to tell the user once.

Leaves the decisions and the look at the data; enters the journal as a notice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Remark:
    """`code` is short and stable. Not a warning: only worth knowing."""

    code: str
    message: str
    warning: bool = True
