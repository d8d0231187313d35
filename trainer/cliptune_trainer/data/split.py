"""Which rows are held out for validation.

Enters: the rows of a table. Leaves: two lists, training and validation. Called by `dataset`. What belongs
together (one group, one image) never parts; the choice depends on the seed and on names alone, not on the
rows' order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cliptune.errors import DataError
from cliptune_trainer.data.table import Pair


def split_by_name(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training and validation rows as the data say. Rows of the test split are in neither."""
    return [pair for pair in pairs if pair.split == "train"], [pair for pair in pairs if pair.split == "val"]


def split_by_group(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Holds out a share of the groups, at least one, where `fraction` is above 0.

    Raises:
        DataError: all rows are one group, so nothing can be held out.
    """
    if fraction == 0.0:
        return list(pairs), []
    groups = _groups(pairs)
    names = sorted(set(groups))
    if len(names) < 2:
        raise DataError(
            "all rows belong to one group, so none can be held out for validation: "
            "set data.validation_fraction = 0 or name a file in data.validation"
        )
    held_out = min(max(round(fraction * len(names)), 1), len(names) - 1)
    shuffled = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    chosen = set(shuffled[:held_out])
    train = [pair for pair, group in zip(pairs, groups, strict=True) if group not in chosen]
    return train, [pair for pair, group in zip(pairs, groups, strict=True) if group in chosen]


def _groups(pairs: Sequence[Pair]) -> list[str]:
    """Its group's name for each row: rows that share a group value or an image, even indirectly, share it."""
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        root = node
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[node] != root:
            parent[node], node = root, parent[node]
        return root

    nodes = [f"image:{pair.identity}" for pair in pairs]
    for pair, node in zip(pairs, nodes, strict=True):
        if pair.group:
            parent[find(node)] = find(f"group:{pair.group}")
    # Named by what the table says, not by where the images lie: a moved data set is split alike.
    names: dict[str, str] = {}
    for pair, node in zip(pairs, nodes, strict=True):
        root, name = find(node), pair.group or pair.reference
        names[root] = min(names.get(root, name), name)
    return [names[find(node)] for node in nodes]
