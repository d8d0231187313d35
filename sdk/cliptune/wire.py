"""Errors on their way across a transport, and back.

gRPC: a CliptuneError becomes the bytes of `google.rpc.Status` with one `google.rpc.ErrorInfo` (trailing
metadata `grpc-status-details-bin`). REST: it becomes problem+json (RFC 9457). The servers encode, the clients
decode; which status belongs to which class stands in `errors.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from cliptune.errors import (
    DOMAIN,
    CliptuneError,
    InternalError,
    UnavailableError,
    all_errors,
    from_wire,
    wire_status,
)

DETAILS_KEY: Final = "grpc-status-details-bin"
PROBLEM_MEDIA_TYPE: Final = "application/problem+json"

# A gRPC peer refuses more than 8 KiB of metadata; message and details travel in it side by side.
_MAX_MESSAGE_BYTES: Final = 1500
_MAX_VALUE_BYTES: Final = 400
_MAX_METADATA_BYTES: Final = 2000

_CODES: Final[dict[int, grpc.StatusCode]] = {code.value[0]: code for code in grpc.StatusCode}


class _Failed(Protocol):
    """What `grpc.Call` and `grpc.aio.AioRpcError` have in common."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def status_message(error: CliptuneError) -> str:
    """The message as the status line of a gRPC call carries it: at most 1500 bytes."""
    return _shortened(error.message, _MAX_MESSAGE_BYTES)


def status_details(error: CliptuneError) -> bytes:
    """A serialised `google.rpc.Status` for the trailing metadata `grpc-status-details-bin`, at most 4 KB."""
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    room = _MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        short = _shortened(value, _MAX_VALUE_BYTES)
        room -= len(key.encode()) + len(short.encode())
        if room < 0:
            break
        info.metadata[key] = short
    status = status_pb2.Status(code=wire_status(error).grpc.value[0], message=status_message(error))
    status.details.add().Pack(info)
    return bytes(status.SerializeToString())


def error_from_details(serialized: bytes) -> CliptuneError | None:
    """Inverse of `status_details`. None when the bytes hold no error of ours."""
    status = status_pb2.Status()
    try:
        status.ParseFromString(serialized)
    except DecodeError:
        return None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
            return from_wire(info.reason, status.message, info.metadata, code)
    return None


def error_from_rpc(error: grpc.RpcError) -> CliptuneError:
    """The error that a failed call means, of `grpc` or `grpc.aio`.

    An error that carries no ErrorInfo (the server cannot be reached, a deadline of the client's own, a
    proxy) is the widest class with its status.
    """
    if not hasattr(error, "trailing_metadata"):
        return InternalError(f"the call failed without a status: {error}")
    failed = cast("_Failed", error)
    for key, value in failed.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            told = error_from_details(value)
            if told is not None:
                return told
    code = failed.code()
    message = failed.details() or f"the call failed with {code.name}"
    return from_wire("", message, {}, code)


def problem(error: CliptuneError, instance: str = "") -> dict[str, Any]:
    """An error as the body of an `application/problem+json`. `instance` is the path that was asked for."""
    reason = type(error).__name__
    body: dict[str, Any] = {
        "type": f"urn:cliptune:error:{reason}",
        "title": (type(error).__doc__ or reason).partition("\n")[0].partition(" Metadata:")[0],
        "status": wire_status(error).http,
        "detail": error.message,
        "reason": reason,
        "metadata": dict(error.metadata),
    }
    if instance:
        body["instance"] = instance
    return body


def error_from_problem(body: Mapping[str, Any]) -> CliptuneError:
    """Inverse of `problem`. A body that is not ours becomes the widest class with its `status`."""
    status = body.get("status")
    message = str(body.get("detail") or body.get("title") or f"the server answered with status {status}")
    metadata = body.get("metadata")
    pairs = {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, Mapping) else {}
    return from_wire(str(body.get("reason", "")), message, pairs, _code_for_http(status))


def _code_for_http(status: object) -> grpc.StatusCode:
    for cls in all_errors().values():
        if cls is not CliptuneError and wire_status(cls).http == status:
            return wire_status(cls).grpc
    if status in (502, 503):  # a proxy before us
        return wire_status(UnavailableError).grpc
    return grpc.StatusCode.INTERNAL


def _shortened(text: str, limit_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit_bytes:
        return encoded.decode()
    return encoded[: limit_bytes - 3].decode("utf-8", "ignore") + "…"
