"""What was probably meant: the known name nearest to an unknown one.

Enters: a name that does not exist and those that do. Leaves: half a sentence. Called where names are looked
up.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_ENOUGH_ALIKE: Final = 0.5


def nearest(name: str, known: Iterable[str]) -> str:
    """Such as " (did you mean 'cosine'?)"; empty when nothing is near."""
    by_case = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_case, n=3, cutoff=_ENOUGH_ALIKE)
    if not found:
        return ""
    return f" (did you mean {' or '.join(repr(by_case[match]) for match in found)}?)"
