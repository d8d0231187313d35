"""How the requests for an alias are shared among versions, and which version gets copies of them.

    models/<name>/traffic.json    {"prod": {"shares": {"2": 0.1}, "shadow": 3}}

Enters: what an operator sets. Leaves: for a request, the version that answers it; for an answered one, the
version that is asked the same in the background. The version that the alias points at has whatever share is
left. Moving the alias ends both: a promotion is the end of its trial. Kept by `models.py`, asked by
`loaded.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cliptune.errors import InvalidInputError
from cliptune.v1 import model_pb2
from cliptune_server.home import write_json

log = logging.getLogger(__name__)

_FILE: Final = "traffic.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Of one alias."""

    shares: Mapping[int, float] = field(default_factory=dict)
    """Version → its part of the requests, above 0; together at most 1."""
    shadow: int = 0
    """Version that gets copies. 0: none."""

    def __post_init__(self) -> None:
        for version, share in self.shares.items():
            if version < 1 or not 0 < share <= 1:
                raise InvalidInputError(
                    f"version {version} cannot have {share:g} of the requests; a share is above 0, at most 1",
                    path="shares",
                )
        if sum(self.shares.values()) > 1 + 1e-9:
            raise InvalidInputError(
                f"the shares {dict(self.shares)} are {sum(self.shares.values()):g} together; at most 1",
                path="shares",
            )
        if self.shadow < 0:
            raise InvalidInputError(f"the shadow is version {self.shadow}", path="shadow")

    @classmethod
    def of(cls, message: model_pb2.Traffic) -> Traffic:
        """From the contract's message. `InvalidInputError` for a version that stands twice."""
        shares = {one.version: one.share for one in message.shares}
        if len(shares) != len(message.shares):
            raise InvalidInputError("a version stands twice among the shares", path="shares")
        return cls(shares=shares, shadow=message.shadow_version)

    def message(self) -> model_pb2.Traffic:
        """Inverse of `of`."""
        shares = [model_pb2.TrafficShare(version=each, share=share) for each, share in self.shares.items()]
        return model_pb2.Traffic(shares=shares, shadow_version=self.shadow)

    @property
    def versions(self) -> set[int]:
        """All that are named."""
        return {*self.shares, *([self.shadow] if self.shadow else [])}

    def choose(self, place: float, otherwise: int) -> int:
        """The version of a request; `place` in [0, 1) chooses, `otherwise` is the alias's own."""
        for version, share in self.shares.items():
            if place < share:
                return version
            place -= share
        return otherwise

    def form(self) -> dict[str, Any]:
        """As the file has it."""
        shares = {str(version): share for version, share in self.shares.items()}
        return {"shares": shares, "shadow": self.shadow}


Rules = dict[tuple[str, str], Traffic]
"""(name, alias) → its traffic."""


def read_rules(models_dir: Path, names: Iterable[str]) -> Rules:
    """Of all names; a file that cannot be read is left out with a line in the log. Blocks."""
    rules: Rules = {}
    for name in names:
        path = models_dir / name / _FILE
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            for alias, form in written.items():
                shares = {int(version): float(share) for version, share in form["shares"].items()}
                rules[name, alias] = Traffic(shares=shares, shadow=int(form["shadow"]))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError, InvalidInputError) as error:
            log.warning("%s cannot be read, so requests are not shared: %s", path, error)
    return rules


def write_rules(models_dir: Path, name: str, rules: Rules) -> None:
    """Those of one name. Blocks."""
    kept = {alias: traffic.form() for (owner, alias), traffic in sorted(rules.items()) if owner == name}
    write_json(models_dir / name / _FILE, kept)
