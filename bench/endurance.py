"""What 10,000 fuzzed requests and 100 versions that take turns under load leave behind: failures, memory.

One daemon with a tiny model for each. The requests come over every face, good and bad, patient and not
(tests/support/fuzzing.py); it fails at the first that is not answered, or answered wrongly. The versions swap
while callers and a bulk stream ask for them (tests/support/swapping.py); it fails at the first request that
fails. Memory is that of the daemon and of the engine, after a warm-up and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

import httpx

from bench.record import Columns, report
from tests.support.daemon import running_daemon
from tests.support.fuzzing import fuzz
from tests.support.memory import resident_bytes
from tests.support.models import publish_test_model
from tests.support.swapping import Swapping

# Of all requests or swaps: until then caches fill and every path is taken for the first time.
_WARM_UP: Final = 0.2


def fuzzed(requests: int, seed: int, folder: Path) -> tuple[list[Columns], Counter[str]]:
    """So many requests; how they ended."""
    home = folder / "home"
    publish_test_model(home, "shapes", serve=True)
    with running_daemon(home) as daemon:
        warm = round(_WARM_UP * requests)
        outcomes = asyncio.run(fuzz(daemon.grpc, daemon.url, requests=warm, seed=seed))
        before = resident_bytes(daemon.pid)
        outcomes += asyncio.run(fuzz(daemon.grpc, daemon.url, requests=requests - warm, seed=seed + 1))
        after = resident_bytes(daemon.pid)
        assert httpx.get(f"{daemon.url}/readyz").status_code == 200
        return _rows(f"{requests:,} fuzzed requests", outcomes.total(), daemon.pid, before, after), outcomes


def swapped(swaps: int, folder: Path) -> list[Columns]:
    """So many swaps."""
    home = folder / "home"
    first = publish_test_model(home, "shapes", seed=1, aliases=["prod"], serve=True)
    second = publish_test_model(home, "shapes", seed=2)
    with running_daemon(home) as daemon:
        swapping = Swapping(
            daemon.grpc, "shapes@prod", (f"shapes:{first.version}", f"shapes:{second.version}")
        )
        samples: list[dict[int, int]] = []

        async def sample(number: int) -> None:
            if number + 1 in (round(_WARM_UP * swaps), swaps):
                samples.append(await asyncio.to_thread(resident_bytes, daemon.pid))

        asyncio.run(swapping.run(swaps, sample))
        answered = swapping.answered.total()
        return _rows(f"{swaps} swaps under load", answered, daemon.pid, samples[0], samples[-1])


def _rows(
    case: str, answered: int, daemon: int, before: dict[int, int], after: dict[int, int]
) -> list[Columns]:
    assert set(before) == set(after), "a process was replaced"
    return [
        {
            "case": case,
            "requests": answered,
            "failed": 0,  # the first one that fails ends the run
            "process": "daemon" if pid == daemon else "engine",
            "MiB_before": round(before[pid] / 2**20, 1),
            "MiB_after": round(after[pid] / 2**20, 1),
            "growth_percent": round(100 * (after[pid] / before[pid] - 1), 2),
        }
        for pid in sorted(before, key=lambda pid: pid != daemon)
    ]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="0: none (default: %(default)s)")
    parser.add_argument("--swaps", type=int, default=100, help="0: none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows: list[Columns] = []
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as folder:
        if arguments.requests:
            found, outcomes = fuzzed(arguments.requests, arguments.seed, Path(folder) / "fuzzed")
            rows += found
            for outcome, count in sorted(outcomes.items()):
                print(f"{count:6,}  {outcome}")
        if arguments.swaps:
            rows += swapped(arguments.swaps, Path(folder) / "swapped")
    report("endurance", rows)


if __name__ == "__main__":
    main()
