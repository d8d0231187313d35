"""What a benchmark found: rows of ours beside a peer, and how they are shown and kept.

Enters: `Row`s, from a benchmark's `main`. Leaves: a table and one line of JSON on stdout, and
`bench/results/NAME.DEVICE.json`, of which `scripts/benchmarks.py` makes docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent / "results"
_DISTRIBUTIONS: Final = (
    "cliptune",
    "torch",
    "open_clip_torch",
    "numpy",
    "grpcio",
    "protobuf",
    "fastapi",
    "uvicorn",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison. `ratio` is above 1 when ours is the better one."""

    case: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    """ "s", "ms": less is better. "images/s", "texts/s": more is better."""

    @property
    def ratio(self) -> float:
        """How many times better ours is than the peer; 1: alike."""
        return self.ours / self.peer if self.unit.endswith("/s") else self.peer / self.ours

    def cells(self) -> tuple[str, ...]:
        """As a table shows it, under `HEADS`."""
        return (
            self.case,
            f"{self.ours:.3g} {self.unit}",
            self.peer_name,
            f"{self.peer:.3g} {self.unit}",
            f"{self.ratio:.2f}",
        )


HEADS: Final = ("case", "ours", "peer", "the peer's", "ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run of one benchmark on one device."""

    name: str
    device: str
    date: str
    command: str
    versions: dict[str, str]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, name: str, rows: Iterable[Row]) -> Result:
        """Of this run, in this process, on this device."""
        return cls(
            name=name,
            device=device(),
            date=datetime.now(UTC).date().isoformat(),
            command=" ".join(["python -m", f"bench.{name}", *sys.argv[1:]]),
            versions={
                "python": platform.python_version(),
                **{one: metadata.version(one) for one in _DISTRIBUTIONS},
            },
            rows=tuple(rows),
        )

    @property
    def file_name(self) -> str:
        """ "NAME.DEVICE.json"."""
        return f"{self.name}.{re.sub(r'[^a-z0-9]+', '-', self.device.lower()).strip('-')}.json"

    def as_json(self) -> dict[str, Any]:
        """What is stored: the fields, and each row's ratio for whoever reads the file alone."""
        rows = [{**asdict(row), "ratio": round(row.ratio, 4)} for row in self.rows]
        return {**asdict(self), "rows": rows}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Result:
        """Inverse of `as_json`."""
        rows = [Row(**{key: value for key, value in row.items() if key != "ratio"}) for row in stored["rows"]]
        return cls(**{**stored, "rows": tuple(rows)})

    def store(self, folder: Path = RESULTS) -> Path:
        """Write the file; an older result of this benchmark on this device is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        path.write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def device() -> str:
    """What the numbers belong to: the accelerator if there is one, and the cores; "2 cores x86_64 linux"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} cores {platform.machine()} {platform.system().lower()}"


def stored_results(folder: Path = RESULTS) -> list[Result]:
    """Every kept result, by benchmark and device."""
    return [
        Result.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table whose columns line up."""
    lines = [HEADS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([padded[0], rule, *padded[1:]])


def report(name: str, rows: Iterable[Row]) -> None:
    """The end of every benchmark: the table, the file, and one line of JSON."""
    result = Result.of(name, rows)
    print(table(result.rows))
    print(f"stored: {result.store()}")
    print(json.dumps(result.as_json(), ensure_ascii=False))
