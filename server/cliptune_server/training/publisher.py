"""Where finished models go and published ones come from, as jobs see it; `catalog/models.py` does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cliptune.v1 import job_pb2, spec_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """What became of an export."""

    model: job_pb2.ModelPublished
    not_loaded: str = ""
    """For the user: why it is not served although its spec says so. Empty when all is as wanted."""


class Publisher(Protocol):
    """Takes finished models in."""

    async def publish(
        self, job_id: str, publish: spec_pb2.PublishSpec, export_dir: Path, metrics: Mapping[str, float]
    ) -> Publication:
        """Publishes an exported model; a second call for one job gives the first one's version."""
        ...

    async def resolve_source(self, name: str) -> str:
        """ "registry:NAME@ALIAS" → "local-dir:PATH" of the version it means now. `ModelNotFoundError`."""
        ...
