"""Every error that cliptune raises, and how each crosses the wire.

    CliptuneError
    ├── InvalidInputError            INVALID_ARGUMENT     400
    │   ├── SpecError                                     422   a field of a job spec: `path`, `allowed`
    │   ├── ImageDecodeError                                    corrupt, truncated or not an image
    │   ├── ImageSizeError                                      0 pixels, too many, or too wide
    │   ├── TextError                                           empty or too long
    │   ├── ContextLengthError                                  the text tower cannot take so many tokens
    │   ├── TensorError                                         wrong dtype or shape, NaN or infinity
    │   └── DataError                                           a data set: `row`, `file`
    │       └── MissingColumnError                              `column`, `found`
    ├── NotFoundError                NOT_FOUND            404
    │   ├── JobNotFoundError
    │   ├── ModelNotFoundError
    │   └── DatasetNotFoundError
    ├── ConflictError                FAILED_PRECONDITION  409
    │   ├── JobStateError                                       the state is named: `state`
    │   ├── ModelStateError                                     loaded, not loaded, or an alias points at it
    │   ├── HomeLockedError                                     another daemon owns this home
    │   ├── WeightsUnavailableError                             not installed, or the hub cannot be reached
    │   ├── ModelDamagedError                                   a file is missing, cut, or another: `file`
    │   └── AdapterBaseError                                    an adapter of other weights: `wanted`, `found`
    ├── PathOutsideRootsError        PERMISSION_DENIED    403
    ├── UnauthenticatedError         UNAUTHENTICATED      401
    ├── OverloadedError              RESOURCE_EXHAUSTED   429   `retry_after_s`
    │   ├── RequestTooLargeError                          413
    │   └── DiskFullError                                 507   or beyond a quota
    ├── UnavailableError             UNAVAILABLE          503   the daemon or its engine is away
    ├── DeadlineExceededError        DEADLINE_EXCEEDED    504
    ├── CancelledError               CANCELLED            499
    └── InternalError                INTERNAL             500   our fault

The table below is the only place that knows a status. On the wire the class travels by name: as `reason` in
`google.rpc.ErrorInfo` (gRPC) and in problem+json (REST), and as `ErrorDetail.reason` inside messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import grpc

from cliptune.v1 import error_pb2

DOMAIN: Final = "cliptune"


class CliptuneError(Exception):
    """Base of all. `message` is for a person; `metadata` (all strings) for a program."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore, (type(self).__name__, self.message, self.metadata))


class InvalidInputError(CliptuneError):
    """The request itself is wrong; sending it again will not help."""


class SpecError(InvalidInputError):
    """A field of a job spec is unknown or out of range. Metadata: `path`, `allowed`."""


class ImageDecodeError(InvalidInputError):
    """The bytes are not a whole image."""


class ImageSizeError(InvalidInputError):
    """An image with no pixels, too many, or a side too long. Metadata: `width`, `height`, `limit`."""


class TextError(InvalidInputError):
    """An empty text or one beyond the limit. Metadata: `length`, `limit`."""


class ContextLengthError(InvalidInputError):
    """A text tower cannot be made to take this many tokens. Metadata: `wanted`, `found`, `limit`."""


class TensorError(InvalidInputError):
    """A tensor of the wrong dtype or shape, or with NaN or infinity in it."""


class DataError(InvalidInputError):
    """A data set cannot be used. Metadata: `file`, `row` (1 is the first after the header)."""


class MissingColumnError(DataError):
    """A column named in the spec is not in the file. Metadata: `column`, `found`."""


class NotFoundError(CliptuneError):
    """What was named does not exist."""


class JobNotFoundError(NotFoundError):
    """No job has this id."""


class ModelNotFoundError(NotFoundError):
    """No model, version or alias has this name."""


class DatasetNotFoundError(NotFoundError):
    """No data set has this name."""


class ConflictError(CliptuneError):
    """The request is right but the state of things does not allow it."""


class JobStateError(ConflictError):
    """The job's state does not allow the command. Metadata: `state`."""


class ModelStateError(ConflictError):
    """The model is loaded, not loaded, or still named by an alias."""


class HomeLockedError(ConflictError):
    """Another daemon owns this home. Metadata: `owner`."""


class WeightsUnavailableError(ConflictError):
    """Pretrained weights could not be fetched; the message names the offline ways."""


class ModelDamagedError(ConflictError):
    """A model's file is missing or has another checksum than it should. Metadata: `file`."""


class AdapterBaseError(ConflictError):
    """An adapter was trained over other weights than the model's. Metadata: `wanted`, `found` (SHA-256)."""


class PathOutsideRootsError(CliptuneError):
    """A path outside the folders that the daemon may read. Metadata: `path`, `roots`."""


class UnauthenticatedError(CliptuneError):
    """A wrong or missing secret."""


class OverloadedError(CliptuneError):
    """No room now. Metadata: `retry_after_s`, where known."""


class RequestTooLargeError(OverloadedError):
    """More items or bytes than one request may hold. Metadata: `limit`."""


class DiskFullError(OverloadedError):
    """No space left where cliptune writes, or in its quota."""


class UnavailableError(CliptuneError):
    """The daemon, or the engine below it, is away; safe calls may be sent again."""


class DeadlineExceededError(CliptuneError):
    """Not done in the time that the caller gave."""


class CancelledError(CliptuneError):
    """The caller, or a shutdown, ended the call."""


class InternalError(CliptuneError):
    """A bug of ours."""


class WireStatus(NamedTuple):
    """How a class is told over each transport."""

    grpc: grpc.StatusCode
    http: int


# A class that is missing here takes its parent's line.
_STATUS: Final[dict[type[CliptuneError], WireStatus]] = {
    CliptuneError: WireStatus(grpc.StatusCode.INTERNAL, 500),
    InvalidInputError: WireStatus(grpc.StatusCode.INVALID_ARGUMENT, 400),
    SpecError: WireStatus(grpc.StatusCode.INVALID_ARGUMENT, 422),
    NotFoundError: WireStatus(grpc.StatusCode.NOT_FOUND, 404),
    ConflictError: WireStatus(grpc.StatusCode.FAILED_PRECONDITION, 409),
    PathOutsideRootsError: WireStatus(grpc.StatusCode.PERMISSION_DENIED, 403),
    UnauthenticatedError: WireStatus(grpc.StatusCode.UNAUTHENTICATED, 401),
    OverloadedError: WireStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    RequestTooLargeError: WireStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, 413),
    DiskFullError: WireStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, 507),
    UnavailableError: WireStatus(grpc.StatusCode.UNAVAILABLE, 503),
    DeadlineExceededError: WireStatus(grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    CancelledError: WireStatus(grpc.StatusCode.CANCELLED, 499),
    InternalError: WireStatus(grpc.StatusCode.INTERNAL, 500),
}


def all_errors() -> dict[str, type[CliptuneError]]:
    """Name → class of the whole tree."""
    found: dict[str, type[CliptuneError]] = {}
    pending: list[type[CliptuneError]] = [CliptuneError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found


def wire_status(error: CliptuneError | type[CliptuneError]) -> WireStatus:
    """gRPC and HTTP status of an error: its class's line in the table, or its nearest parent's."""
    cls = error if isinstance(error, type) else type(error)
    return next(_STATUS[parent] for parent in cls.__mro__ if parent in _STATUS)


def from_wire(
    reason: str, message: str, metadata: Mapping[str, str], status: grpc.StatusCode = grpc.StatusCode.UNKNOWN
) -> CliptuneError:
    """The error that crossed a transport. An unknown `reason` (a newer server) falls back on its status."""
    cls = all_errors().get(reason) or from_status(status)
    error = cls(message)
    error.metadata = dict(metadata)
    return error


def from_status(status: grpc.StatusCode) -> type[CliptuneError]:
    """The widest class with this gRPC status; for errors that carry no reason."""
    return next(
        (cls for cls, line in _STATUS.items() if line.grpc is status and cls is not CliptuneError),
        InternalError,
    )


def to_detail(error: CliptuneError) -> error_pb2.ErrorDetail:
    """As a field inside a message."""
    return error_pb2.ErrorDetail(reason=type(error).__name__, message=error.message, metadata=error.metadata)


def from_detail(detail: error_pb2.ErrorDetail) -> CliptuneError:
    """Inverse of `to_detail`."""
    return from_wire(detail.reason, detail.message, detail.metadata)


def _restore(name: str, message: str, metadata: dict[str, str]) -> CliptuneError:
    return from_wire(name, message, metadata)
