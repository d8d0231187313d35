"""Where uploaded data sets are, as jobs see it; `datasets/stored.py` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cliptune.dataset_layout import SCHEME
from cliptune.v1 import spec_pb2


class DataNames(Protocol):
    """Knows what lies with the daemon."""

    def locate(self, reference: str) -> str:
        """ "dataset:NAME" or "dataset:NAME/PATH" → the path it means. Blocks.

        `DatasetNotFoundError`, `DataError`.
        """
        ...


def reads_data_set(spec: spec_pb2.JobSpec, name: str, files: Path) -> bool:
    """Whether a spec names this data set, or a path in it."""
    named = (spec.data.train, spec.data.validation, spec.data.image_root)
    for value in (*named, spec.guard.probe.data, spec.guard.probe.image_root):
        if value.startswith(SCHEME):
            if value.removeprefix(SCHEME).partition("/")[0] == name:
                return True
        elif value and Path(value).is_relative_to(files):
            return True
    return False
