"""A TCP proxy that cuts connections: a network that fails in the middle of an upload."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PIECE_BYTES = 64 * 1024


class CuttingProxy:
    """Forwards to `target`. Connection n is cut when it has brought `cuts[n]` bytes; later ones stay."""

    def __init__(self, target: str, cuts: list[int]) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._cuts = cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def serve(self) -> None:
        """Until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                limit = self._cuts[self.connections] if self.connections < len(self._cuts) else None
                self.connections += 1
                self._open += [client, server]
                for source, sink, bytes_left in ((client, server, limit), (server, client, None)):
                    threading.Thread(target=_forward, args=(source, sink, bytes_left), daemon=True).start()

    def close(self) -> None:
        """Cut everything."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _forward(source: socket.socket, sink: socket.socket, bytes_left: int | None) -> None:
    with contextlib.suppress(OSError):
        while bytes_left is None or bytes_left > 0:
            piece = source.recv(_PIECE_BYTES)
            if not piece:
                break
            sink.sendall(piece)
            bytes_left = None if bytes_left is None else bytes_left - len(piece)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting_proxy(target: str, cuts: list[int]) -> Iterator[CuttingProxy]:
    """One for the block."""
    proxy = CuttingProxy(target, cuts)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
