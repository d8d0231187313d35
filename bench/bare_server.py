"""The peer of a daemon: FastAPI under uvicorn and grpc.aio with a health service on one loop, nothing else.

`python -m bench.bare_server` prints {"grpc": "HOST:PORT", "http": "HOST:PORT"} when it listens and ends by
SIGTERM. Started by the benchmarks `startup` and `latency` through `bare_server()`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bare_server() -> Iterator[dict[str, str]]:
    """A process of it for as long as the block lasts; gives its addresses once it listens."""
    command = [sys.executable, "-m", "bench.bare_server"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


async def _serve() -> None:
    import socket

    import grpc.aio
    import uvicorn
    from fastapi import FastAPI
    from grpc_health.v1 import health, health_pb2_grpc

    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    rpc = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    # asyncio switches Nagle's algorithm off (40 ms an answer) only where the protocol is said outright.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        http = f"127.0.0.1:{listener.getsockname()[1]}"
        print(json.dumps({"grpc": f"127.0.0.1:{port}", "http": http}), flush=True)
        await uvicorn.Server(uvicorn.Config(app, log_level="error")).serve([listener])
    await rpc.stop(None)


if __name__ == "__main__":
    import asyncio

    asyncio.run(_serve())
