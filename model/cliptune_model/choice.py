"""A choice together with its reason, as the policy makes it and plans, logs and `cliptune doctor` show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An automatic or a checked choice: what was decided, the value, and why."""

    subject: str
    value: str
    reason: str
