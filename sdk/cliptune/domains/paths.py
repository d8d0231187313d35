"""The fields of a spec by their paths: "train.epochs", "loss.parameters.margin", "evaluation.classes".

In: a `JobSpec` and paths. Out: which are set, and what they hold. A table of names and values has a path for
each name; a list has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

from cliptune.spec import is_map, is_repeated
from cliptune.v1 import spec_pb2

# Parts that are taken as a whole: their fields cannot say "no" one by one, so that an empty one means none.
WHOLE: Final = frozenset({"data.augment"})


def set_paths(spec: spec_pb2.JobSpec) -> list[str]:
    """The fields that are set, in the contract's order."""
    return list(_set_paths(spec, ""))


def value_at(spec: spec_pb2.JobSpec, path: str) -> Any:
    """What a field holds, set or not."""
    node: Any = spec
    rest = path
    while rest:
        name, _, rest = rest.partition(".")
        field = node.DESCRIPTOR.fields_by_name[name]
        node = getattr(node, name)
        if rest and is_map(field):
            return node[rest]  # a name may hold dots
    return node


def _set_paths(message: Any, prefix: str) -> Iterator[str]:
    for field, value in message.ListFields():
        path = prefix + field.name
        if is_map(field):
            yield from (f"{path}.{key}" for key in sorted(value))
        elif not is_repeated(field) and field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = list(_set_paths(value, f"{path}."))
            yield from inner or ([path] if path in WHOLE else [])
        else:
            yield path
