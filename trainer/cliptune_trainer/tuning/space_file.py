"""A study's folder: what varies, as preparation settled it, and the names of the files beside it.

Enters and leaves: `Dimension`s. Called by preparation, which writes them, and by the runner.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from cliptune.durable import write_atomically
from cliptune_trainer.spec.tune import Dimension

SPACE_FILE: Final = "space.json"
STUDY_FILE: Final = "study.db"


def write_space(folder: Path, dimensions: Sequence[Dimension]) -> None:
    """Keeps the space for the runner."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps([asdict(dimension) for dimension in dimensions], indent=2)
    write_atomically(folder / SPACE_FILE, content.encode())


def read_space(folder: Path) -> tuple[Dimension, ...]:
    """Inverse of `write_space`."""
    stored = json.loads((folder / SPACE_FILE).read_text(encoding="utf-8"))
    return tuple(Dimension(**{**entry, "values": tuple(entry["values"])}) for entry in stored)
