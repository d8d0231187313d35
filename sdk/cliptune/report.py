"""What a job that has succeeded leaves for people and for programs. Made by `codec.py`, handed out by both
clients.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliptune.v1 import training_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReport:
    """A job's report."""

    html: str = field(repr=False)
    """A page that is readable on its own: styles and pictures are in it, and it reaches for nothing."""
    figures: Mapping[str, Any] = field(repr=False)
    """The same as numbers and names: `report.json`. What cannot be told is None."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; returns where it is. OSError where it cannot be written."""
        file = Path(path)
        file.write_text(self.html, encoding="utf-8")
        return file


def report_from_message(message: training_pb2.GetJobReportResponse) -> JobReport:
    """The view of a `GetJobReportResponse`."""
    return JobReport(html=message.html, figures=json.loads(message.json))
