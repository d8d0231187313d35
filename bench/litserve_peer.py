"""Starts the peer of the serving benchmark, `litserve_app.py`, with an interpreter that has litserve.

Enters: the interpreter and an exported model's folder. Leaves: the address of a server that answers. Used by
`bench.serving --litserve PYTHON`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

_APP = Path(__file__).with_name("litserve_app.py")
_START_LIMIT_S = 120.0


@contextlib.contextmanager
def litserve(python: str, folder: Path, *, threads: int) -> Iterator[str]:
    """A process of it for as long as the block lasts; gives its URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [python, str(_APP), str(folder), str(port), str(threads)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            until_s = time.monotonic() + _START_LIMIT_S
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError(f"LitServe did not start: {' '.join(command)}")
                time.sleep(0.2)
            yield url
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """LitServe's workers are processes of the same group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
