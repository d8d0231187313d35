"""How long until the client is imported and the daemon listens, each in a fresh process.

The client beside the libraries that it stands on, imported alone (what is the least possible), and beside
`import open_clip` (what a user without a daemon waits for). The daemon, until it prints its addresses, beside
a bare server with the same two faces.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path

from bench.bare_server import bare_server
from bench.record import Row, report
from bench.turns import medians, seconds
from tests.support.daemon import running_daemon

LIBRARIES = "import grpc, numpy, google.protobuf.message"
IMPORTS = ("import cliptune", "from cliptune import Client", LIBRARIES, "import open_clip")


def run_python(code: str) -> None:
    """A fresh interpreter, from its launch to its end."""
    subprocess.run([sys.executable, "-c", code], check=True)


def bare_start() -> float:
    """A bare server, from its launch until it listens, in s."""
    began = time.perf_counter()
    with bare_server():
        return time.perf_counter() - began


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions

    imports = medians({code: seconds(partial(run_python, code)) for code in IMPORTS}, repetitions)
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as folder:
        homes = count()

        def daemon_start() -> float:
            with running_daemon(Path(folder) / f"home{next(homes)}", wait_ready=False) as daemon:
                return daemon.start_s

        starts = medians({"daemon": daemon_start, "bare": bare_start}, repetitions)
    rows = [
        Row(case=ours, ours=imports[ours], peer=imports[peer], peer_name=peer, unit="s")
        for ours, peer in (
            # `import cliptune` alone defers what a client needs, so it is no fair match for the libraries.
            ("from cliptune import Client", LIBRARIES),
            ("from cliptune import Client", "import open_clip"),
            ("import cliptune", "import open_clip"),
        )
    ]
    rows.append(
        Row(
            case="daemon until it listens",
            ours=starts["daemon"],
            peer=starts["bare"],
            peer_name="FastAPI, uvicorn and grpc.aio alone",
            unit="s",
        )
    )
    report("startup", rows)


if __name__ == "__main__":
    main()
