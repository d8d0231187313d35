"""uvicorn on the daemon's own loop, for the gateway.

Enters: an ASGI app and a bound socket. Leaves: HTTP answers. Started and stopped by `daemon.py`, which also
owns the signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn


class _Uvicorn(uvicorn.Server):
    """The daemon handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


class HttpServer:
    """One listening gateway."""

    def __init__(self, app: Any, bound: socket.socket, *, grace_s: float) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        self._server = _Uvicorn(config)
        self._socket = bound
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Answer from the next turn of the loop on; until then connections wait in the socket."""
        self._socket.listen(1024)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="gateway")

    async def stop(self) -> None:
        """Accept no more, answer what is in flight within the grace, cut off the rest."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
