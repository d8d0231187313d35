"""Images of equal content under several names: joined, and told, dropped or refused.

Enters: tables and what examining them found. Leaves: the usable pairs of each table, in which equal images
have one identity, and what is to be told. Called by `dataset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cliptune.errors import DataError
from cliptune_trainer.data.findings import Findings
from cliptune_trainer.data.listing import counted, listed
from cliptune_trainer.data.table import Pair, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """The usable pairs of each table. `copies`: images that repeat an earlier one, as "row N (name) is row M
    (name)"; `dropped`: they are no longer among the pairs."""

    pairs: list[list[Pair]]
    copies: list[str]
    dropped: bool

    def message(self) -> str:
        """For one notice about all of them; "" for none."""
        if not self.copies:
            return ""
        what = "left out" if self.dropped else "taken for the same image"
        return f"{counted(len(self.copies), 'image')} under a second name, {what}: {listed(self.copies)}"


def join_duplicates(tables: Sequence[Table], findings: Findings, policy: str) -> Joined:
    """Leaves unreadable rows out and gives equal images one identity, over all tables.

    Args:
        tables: training rows first.
        findings: of these tables.
        policy: "notice", "drop" (all but the first) or "refuse".

    Raises:
        DataError: there are some, and the policy is to refuse them.
    """
    first: dict[str, tuple[Table, Pair]] = {}
    told: dict[str, str] = {}  # by image
    joined: list[list[Pair]] = []
    for table in tables:
        path = str(table.path)
        unreadable, contents = findings.unreadable[path], findings.contents.get(path, {})
        usable: list[Pair] = []
        for pair in table.pairs:
            if pair.row in unreadable:
                continue
            content = contents.get(pair.row)
            if content is None:
                usable.append(pair)
                continue
            earlier_table, earlier = first.setdefault(content, (table, pair))
            if earlier.image == pair.image:
                usable.append(pair)
                continue
            told.setdefault(
                str(pair.image),
                f"{_place(table, pair, tables)} is {_place(earlier_table, earlier, tables)}",
            )
            if policy != "drop":
                usable.append(replace(pair, original=earlier.identity))
        joined.append(usable)
    copies = list(told.values())
    if copies and policy == "refuse":
        raise DataError(
            f"{counted(len(copies), 'image')} under a second name, and data.duplicates = 'refuse':"
            f" {listed(copies)}",
            copies=len(copies),
        )
    return Joined(pairs=joined, copies=copies, dropped=policy == "drop")


def _place(table: Table, pair: Pair, tables: Sequence[Table]) -> str:
    """Of a row, for a person; the table is named where there are two."""
    of = f"{table.path.name}, " if len(tables) > 1 else ""
    return f"{of}row {pair.row} ({pair.reference})"
