"""A few of many, for one message.

Enters: what is to be told, a text each. Leaves: the first few and how many more there are. Called wherever
rows are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

LISTED: Final = 5


def counted(count: int, noun: str) -> str:
    """ "1 image", "2,000 images"."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def listed(told: Sequence[str]) -> str:
    """ "a; b; c; and 3 more"."""
    rest = f"; and {len(told) - LISTED} more" if len(told) > LISTED else ""
    return "; ".join(told[:LISTED]) + rest


def rows_listed(rows: Sequence[int]) -> str:
    """ "row 3" or "rows 3, 5, 8 and 12 more"."""
    shown = ", ".join(map(str, rows[:LISTED]))
    rest = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{rest}"
