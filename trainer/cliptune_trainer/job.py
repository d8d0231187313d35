"""The folder of one job, as the trainer sees it.

Enters: the folder that the launcher names. Leaves: paths and the spec. Called by `main`, preparation and the
loop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import json_format

from cliptune.domains import Layered, layered
from cliptune.errors import SpecError
from cliptune.v1 import spec_pb2

if TYPE_CHECKING:
    from cliptune_trainer.spec import Spec


@dataclass(frozen=True, slots=True)
class JobFolder:
    """`path` is `<home>/jobs/<id>`."""

    path: Path

    @property
    def job_id(self) -> str:
        """The job's id."""
        described = self.path / "job.json"
        if described.exists():
            return str(json.loads(described.read_text(encoding="utf-8")).get("id") or self.path.name)
        return self.path.name

    def message(self) -> spec_pb2.JobSpec:
        """The job's spec as it was submitted. Raises `SpecError`."""
        try:
            text = (self.path / "spec.json").read_text(encoding="utf-8")
            return json_format.Parse(text, spec_pb2.JobSpec())
        except OSError as error:
            raise SpecError(f"{self.path} has no spec: {error}", path="spec.json") from error
        except json_format.ParseError as error:
            raise SpecError(f"the spec cannot be read: {error}", path="spec.json") from error

    def layers(self) -> Layered:
        """The job's spec over its domain's recipe over the defaults. Raises `SpecError`."""
        return layered(self.message())

    def spec(self) -> Spec:
        """The whole of it, checked. Raises `SpecError`."""
        from cliptune_trainer.spec import from_proto  # brings torch: not at the process's start

        return from_proto(self.layers().spec)

    @property
    def home(self) -> Path | None:
        """Where the daemon keeps everything; None: the folder is not one of a home's."""
        return self.path.parent.parent if self.path.parent.name == "jobs" else None

    def journal(self, attempt: int) -> Path:
        """Where an attempt keeps its journal."""
        return self.path / "journal" / f"{attempt:04d}.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder of the finished model."""
        return self.path / "export"

    @property
    def starting_weights(self) -> Path:
        """What training changes, as it was before the first step."""
        return self.path / "start.safetensors"

    @property
    def report(self) -> Path:
        """Folder of what a finished job leaves for people and programs."""
        return self.path / "report"

    @property
    def pictures(self) -> Path:
        """Folder of what evaluations drew."""
        return self.path / "pictures"

    @property
    def study(self) -> Path:
        """Folder of a study: what varies, what was tried, the best."""
        return self.path / "study"

    @property
    def learning_rates(self) -> Path:
        """Changes of the peak learning rate by command."""
        return self.path / "learning-rates.json"

    @property
    def own_code(self) -> Path:
        """What a user's own loss or similarity was made of when it was tried out."""
        return self.path / "own-code.json"

    @property
    def findings(self) -> Path:
        """What preparation found out about the data."""
        return self.path / "findings.json"
