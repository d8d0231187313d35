"""What is in both splits and should not be: a group, or an image's content.

Enters: the rows of both splits. Leaves: what leaks, with the rows named, or a `DataError`. Called by
`dataset`. A leak lets the metrics see what was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cliptune.errors import DataError
from cliptune_trainer.data.listing import counted, listed, rows_listed
from cliptune_trainer.data.table import Pair


def find_leaks(train: Sequence[Pair], validation: Sequence[Pair]) -> list[str]:
    """Each group and each image that both splits have, for a person."""
    groups = _shared(train, validation, lambda pair: pair.group)
    leaks = [f"group {group!r} ({_rows(*rows)})" for group, rows in groups]
    images = _shared(train, validation, lambda pair: pair.identity)
    names = {pair.identity: pair.reference for pair in (*validation, *train)}
    return leaks + [f"image {names[identity]} ({_rows(*rows)})" for identity, rows in images]


def refuse_leaks(leaks: Sequence[str], policy: str) -> None:
    """Raises DataError when there are leaks and the policy is "refuse"."""
    if leaks and policy == "refuse":
        raise DataError(
            f"{told_leaks(leaks)}. Part them, or set data.leakage = 'notice'",
            leaks=len(leaks),
        )


def told_leaks(leaks: Sequence[str]) -> str:
    """For one message about all of them."""
    return (
        f"{counted(len(leaks), 'leak')} between the training and the validation rows, which"
        f" makes the metrics flatter: {listed(leaks)}"
    )


def _shared(
    train: Iterable[Pair], validation: Iterable[Pair], key: Callable[[Pair], str]
) -> list[tuple[str, tuple[list[int], list[int]]]]:
    """What both have, with the rows of each that have it."""
    held_out: dict[str, list[int]] = {}
    for pair in validation:
        if name := key(pair):
            held_out.setdefault(name, []).append(pair.row)
    trained: dict[str, list[int]] = {}
    for pair in train:
        if (name := key(pair)) in held_out:
            trained.setdefault(name, []).append(pair.row)
    return [(name, (rows, held_out[name])) for name, rows in trained.items()]


def _rows(train: list[int], validation: list[int]) -> str:
    trained, held_out = list(dict.fromkeys(train)), list(dict.fromkeys(validation))
    return f"training {rows_listed(trained)}, validation {rows_listed(held_out)}"
