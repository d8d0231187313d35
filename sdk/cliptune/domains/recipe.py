"""The data files of this folder: a recipe for each domain, and the defaults below all of them.

In: a domain's name. Out: a `DomainRecipe`. A file holds `summary`, `[spec]` (a part of a job's spec) and
`[why]` (a reason for each field of it, by path); `defaults.toml` holds `[spec]` and `[chosen]`: how fields
without a fixed default are settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cliptune.domains.paths import set_paths, value_at
from cliptune.spec import spec_from_part
from cliptune.spec_shape import DOMAINS, wrong_value
from cliptune.v1 import spec_pb2

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainRecipe:
    """What a domain says.

    Attributes:
        name: of the domain.
        summary: one line for lists.
        spec: only the fields that the recipe sets.
        why: path of a field → why it is so. A path may be a whole part ("data.augment").
    """

    name: str
    summary: str
    spec: spec_pb2.JobSpec
    why: Mapping[str, str]

    def fields(self) -> list[tuple[str, Any]]:
        """Path and value of each field that the recipe sets, in the contract's order."""
        return [(path, value_at(self.spec, path)) for path in set_paths(self.spec)]

    def reasoned_part(self, path: str) -> str:
        """The path under which `why` gives the field's reason: its own, or that of a part around it."""
        part = path
        while part not in self.why and "." in part:
            part = part.rpartition(".")[0]
        return part if part in self.why else path

    def reason(self, path: str) -> str:
        """Of the field, or of the part around it."""
        return self.why.get(self.reasoned_part(path), "")


def load_recipe(name: str) -> DomainRecipe:
    """The recipe of a domain. Raises `SpecError` for a name that is none."""
    if name not in DOMAINS:
        raise wrong_value("domain", name, ", ".join(DOMAINS), DOMAINS)
    content = _content(name)
    return DomainRecipe(
        name=name,
        summary=content["summary"],
        spec=_copy(spec_from_part(content["spec"])),
        why=content["why"],
    )


def recipe(name: str) -> spec_pb2.JobSpec:
    """The fields that a domain sets. Raises `SpecError` for a name that is none."""
    return load_recipe(name).spec


def defaults() -> spec_pb2.JobSpec:
    """What holds where neither spec nor domain says anything."""
    return spec_from_part(_content("defaults")["spec"])


def chosen_later() -> Mapping[str, str]:
    """Path of a field without a fixed default → how it is settled while a job prepares."""
    chosen: Mapping[str, str] = _content("defaults")["chosen"]
    return chosen


def _copy(spec: spec_pb2.JobSpec) -> spec_pb2.JobSpec:
    copy = spec_pb2.JobSpec()
    copy.CopyFrom(spec)
    return copy


@cache
def _content(name: str) -> dict[str, Any]:
    import tomllib  # a client that only infers has no need of it

    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
