"""The job half of the daemon as a process to be killed: `python -m tests.server.training.jobs_daemon ROOT`.

The home is ROOT/home. Prints the port of TrainingService, then serves until SIGTERM, or SIGKILL.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import grpc

from cliptune.v1 import training_pb2_grpc
from cliptune_server.rpc.errors import ErrorInterceptor
from cliptune_server.rpc.training import TrainingServicer
from tests.server.training.house import open_jobs


async def main(root: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    async with open_jobs(root) as jobs:
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(jobs), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, flush=True)
        await stop.wait()
    await server.stop(1)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
