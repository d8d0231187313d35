"""Runs that were judged, kept as they end, so that a benchmark of hours can be cut off, resumed and widened.

Enters: a file of JSON lines beside a benchmark's results, and what a run is asked for. Leaves: what came of
it before, if exactly that was asked for. Used by `quality`. A last line that was cut off counts as none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.record import RESULTS, Result
from bench.trained import Judged, Work

_BETWEEN: Final = "|"


def runs_file(name: str, device: str | None, folder: Path = RESULTS) -> Path:
    """Beside the benchmark's result: "NAME.DEVICE.runs.jsonl"."""
    result = Result.of(name, [], device=device)
    return folder / result.file_name.replace(".json", ".runs.jsonl")


def asked_for(work: Work, home: Path) -> str:
    """What distinguishes a run from every other, wherever its files lie: a digest of its settings.

    Args:
        work: the run.
        home: the folder that its tables were laid in.
    """
    settings = [work.subject.name, work.subject.rows("train"), work.arm, work.device, work.spec]
    told = json.dumps(settings, sort_keys=True).replace(str(home), "")
    return hashlib.sha256(told.encode()).hexdigest()[:16]


class KeptRuns:
    """The file, read once. `found`: by `asked_for`; `starts`: figures of starting models, by a key each.

    Args:
        path: of the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.found: dict[str, Judged] = {}
        self.starts: dict[str, float] = {}
        if path is None or not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            if "start" in entry:
                self.starts[entry["start"]] = entry["value"]
            else:
                self.found[entry["asked"]] = _judged(entry["run"])
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def add(self, asked: str, run: Judged) -> None:
        """Keeps a run that has ended."""
        self.found[asked] = run
        told = asdict(run)
        told["test"] = {_BETWEEN.join(key): metrics for key, metrics in run.test.items()}
        self._append({"asked": asked, "run": told})

    def add_start(self, key: str, value: float) -> None:
        """Keeps a figure of a starting model."""
        self.starts[key] = value
        self._append({"start": key, "value": value})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _judged(told: dict[str, Any]) -> Judged:
    test: dict[tuple[str, str], Mapping[str, float]] = {}
    for key, metrics in told["test"].items():
        column, _, prompts = key.rpartition(_BETWEEN)
        test[column, prompts] = metrics
    return Judged(**{**told, "test": test})
