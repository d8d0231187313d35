"""Addresses to listen on: taken early, so that a port in use is told before anything has started.

Enters: host and port of a face. Leaves: a bound socket, or a `ConflictError` that names the port and the
flag.
"""

from __future__ import annotations

import errno
import socket

from cliptune.errors import CliptuneError, ConflictError, InvalidInputError


def bind(host: str, port: int, face: str) -> socket.socket:
    """A bound TCP socket; port 0 takes any free one. `face` ("grpc", "http") names the flag in errors."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise InvalidInputError(f"the host {host!r} is no address to listen on: {error}", host=host) from None
    bound = socket.socket(family, kind, protocol)
    try:
        # A port whose last connections linger from an earlier daemon is free; one that is listened on is not.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise refusal(error, host, port, face) from None
    return bound


def refusal(error: OSError, host: str, port: int, face: str) -> CliptuneError:
    """What a failed bind means to the user."""
    flag = f"--{face}-port"
    if error.errno == errno.EADDRINUSE:
        return ConflictError(
            f"port {port} of {host} is in use: stop what listens there, or choose another with {flag} "
            f"({flag} 0 takes any free one)",
            port=port,
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConflictError(f"port {port} of {host} may not be listened on: {error.strerror}", port=port)
    return InvalidInputError(f"cannot listen on {host}:{port}: {error.strerror or error}", host=host)


def address(host: str, port: int) -> str:
    """ "HOST:PORT", with brackets for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
