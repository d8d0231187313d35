"""One spec over another: a job's own over its domain's recipe over the defaults.

In: a `JobSpec`. Out: `Layered`, the spec with every field that has a value, and where each comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

from cliptune.domains.paths import WHOLE, set_paths, value_at
from cliptune.domains.recipe import DomainRecipe, defaults, load_recipe
from cliptune.spec import is_map, is_repeated
from cliptune.v1 import spec_pb2

YOURS: Final = "yours"
DEFAULT: Final = "default"

# Fields that make sense only together: where an upper layer sets one of the first, what lower layers say of
# the second does not hold. A margin belongs to the margin loss, not to the one that was asked for in its
# place; and a spec that says which changes its images take means no others.
_DISPLACED: Final = (
    (("loss.name", "loss.terms"), ("loss.name", "loss.terms", "loss.parameters")),
    (("data.augmentation", "data.augment"), ("data.augmentation", "data.augment")),
    (("model.similarity",), ("model.similarity_parameters",)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layered:
    """A spec as it will run.

    Attributes:
        spec: with the defaults, the domain's recipe and what was asked for, one over the other. Fields that
            are settled while the job prepares are still unset.
        origins: path of each field that has a value → "default", "domain NAME" or "yours".
        domain: the recipe; None: no domain was named.
    """

    spec: spec_pb2.JobSpec
    origins: Mapping[str, str]
    domain: DomainRecipe | None

    def value(self, path: str) -> Any:
        """Of a path in `origins`."""
        return value_at(self.spec, path)

    def from_domain(self) -> list[str]:
        """Paths that the domain set, parts that it set as a whole under one name, in the contract's order."""
        told = f"domain {self.domain.name}" if self.domain else ""
        paths = [path for path, origin in self.origins.items() if origin == told]
        return list(dict.fromkeys(_whole(path) for path in paths))


def layered(spec: spec_pb2.JobSpec) -> Layered:
    """The spec over its domain's recipe over the defaults. Raises `SpecError` for an unknown domain."""
    domain = load_recipe(spec.domain) if spec.domain else None
    result = spec_pb2.JobSpec()
    result.CopyFrom(spec)
    origins = dict.fromkeys(set_paths(result), YOURS)
    if domain is not None:
        _lay_under(result, domain.spec, f"domain {domain.name}", origins)
    _lay_under(result, defaults(), DEFAULT, origins)
    order = {path: place for place, path in enumerate(set_paths(result))}
    return Layered(
        spec=result, origins=dict(sorted(origins.items(), key=lambda item: order[item[0]])), domain=domain
    )


def _lay_under(spec: spec_pb2.JobSpec, layer: spec_pb2.JobSpec, origin: str, origins: dict[str, str]) -> None:
    """Fills what `spec` leaves open from `layer`."""
    closed: set[str] = set()
    for heads, displaced in _DISPLACED:
        if any(_is_set(spec, head) for head in heads):
            closed.update(displaced)
    before = set(origins)
    _merge(spec, layer, "", closed)
    origins.update(dict.fromkeys((path for path in set_paths(spec) if path not in before), origin))


def _merge(message: Any, layer: Any, prefix: str, closed: set[str]) -> None:
    for field, value in layer.ListFields():
        path = prefix + field.name
        if path in closed:
            continue
        if is_map(field):
            entries = getattr(message, field.name)
            for key in value:
                if key not in entries:
                    entries[key] = value[key]
        elif is_repeated(field):
            if not getattr(message, field.name):
                getattr(message, field.name).extend(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            if path in WHOLE:
                if not message.HasField(field.name):
                    inner.CopyFrom(value)
            else:
                _merge(inner, value, f"{path}.", closed)
        elif not _has(message, field):
            setattr(message, field.name, value)


def _is_set(spec: spec_pb2.JobSpec, path: str) -> bool:
    part, _, name = path.partition(".")
    message = getattr(spec, part)
    return _has(message, message.DESCRIPTOR.fields_by_name[name])


def _has(message: Any, field: FieldDescriptor) -> bool:
    return message.HasField(field.name) if field.has_presence else bool(getattr(message, field.name))


def _whole(path: str) -> str:
    return next((part for part in WHOLE if path.startswith(f"{part}.")), path)
