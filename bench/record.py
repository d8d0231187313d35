"""What a benchmark found: rows of ours beside a peer, and how they are shown and kept.

Enters: `Row`s or named columns, from a benchmark's `main`. Leaves: a table and one line of JSON on stdout,
and `bench/results/NAME.DEVICE.json`, of which `scripts/benchmarks.py` makes docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
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


# A line of a table: its columns by name, the same in every line.
Columns = Mapping[str, str | int | float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison of ours with a peer. `ratio` is above 1 when ours is the better one."""

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

    def columns(self) -> Columns:
        """As a line of a table."""
        return {**asdict(self), "ratio": round(self.ratio, 4)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run of one benchmark on one device. `more`: further tables, by their titles."""

    name: str
    device: str
    date: str
    command: str
    versions: dict[str, str]
    rows: tuple[Columns, ...]
    more: dict[str, tuple[Columns, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        rows: Iterable[Row | Columns],
        *,
        device: str | None = None,
        more: Mapping[str, Iterable[Row | Columns]] | None = None,
    ) -> Result:
        """Of this run, in this process. `device`: what the figures belong to; None: this machine's cores."""
        return cls(
            name=name,
            device=device or cores(),
            date=datetime.now(UTC).date().isoformat(),
            command=" ".join(["python -m", f"bench.{name}", *map(_anywhere, sys.argv[1:])]),
            versions={
                "python": platform.python_version(),
                **dict(_installed()),
            },
            rows=tuple(_columns(row) for row in rows),
            more={title: tuple(_columns(row) for row in lines) for title, lines in (more or {}).items()},
        )

    @property
    def file_name(self) -> str:
        """ "NAME.DEVICE.json"."""
        return f"{self.name}.{re.sub(r'[^a-z0-9]+', '-', self.device.lower()).strip('-')}.json"

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Result:
        """Inverse of `asdict` through JSON."""
        more = {title: tuple(lines) for title, lines in stored.get("more", {}).items()}
        return cls(**{**stored, "rows": tuple(stored["rows"]), "more": more})

    def store(self, folder: Path = RESULTS) -> Path:
        """Write the file; an older result of this benchmark on this device is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def _anywhere(argument: str) -> str:
    """An argument as it would be given on another machine: where a path lies there is its user's affair."""
    return Path(argument).name.upper() if Path(argument).is_absolute() else argument


def cores() -> str:
    """This machine without an accelerator: "2 cores x86_64 linux"."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{count} cores {platform.machine()} {platform.system().lower()}"


def gpu(full_name: str) -> str:
    """A GPU by the name people use: "NVIDIA H100 80GB HBM3" → "h100", "Apple M2 Pro" → "m2 pro"."""
    unsaid = r"nvidia|apple|geforce|tesla|\d+gb|hbm\w*|pcie|sxm\d*"
    kept = [word for word in full_name.lower().split() if not re.fullmatch(unsaid, word)]
    return " ".join(kept) or full_name.lower()


def stored_results(folder: Path = RESULTS) -> list[Result]:
    """Every kept result, by benchmark and device."""
    return [
        Result.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    ]


def of_other_models(
    name: str, device: str, models: Set[str], folder: Path = RESULTS
) -> dict[str, list[Columns]]:
    """A stored result's tables by title ("": the first) without the lines of `models`, which will be new."""
    stored = [result for result in stored_results(folder) if (result.name, result.device) == (name, device)]
    tables = {"": stored[0].rows, **stored[0].more} if stored else {}
    kept = {title: [row for row in rows if row["model"] not in models] for title, rows in tables.items()}
    return {title: rows for title, rows in kept.items() if rows}


def table(rows: Sequence[Columns]) -> str:
    """The rows as a Markdown table whose columns line up."""
    heads = [name.replace("_", " ") for name in rows[0]] if rows else []
    lines = [heads, *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([padded[0], rule, *padded[1:]])


def tables(result: Result) -> str:
    """All tables of a result, as Markdown."""
    further = [f"{title}\n\n{table(rows)}" for title, rows in result.more.items()]
    return "\n\n".join([table(result.rows), *further])


def report(
    name: str,
    rows: Iterable[Row | Columns],
    *,
    device: str | None = None,
    more: Mapping[str, Iterable[Row | Columns]] | None = None,
) -> None:
    """The end of every benchmark: the tables, the file, and one line of JSON."""
    result = Result.of(name, rows, device=device, more=more)
    print(tables(result))
    print(f"stored: {result.store()}")
    print(json.dumps(asdict(result), ensure_ascii=False))


def _installed() -> Iterator[tuple[str, str]]:
    """Those of the libraries that matter which are here: a machine may have what one benchmark needs only."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def _columns(row: Row | Columns) -> Columns:
    return row.columns() if isinstance(row, Row) else dict(row)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
