"""Asking grpc.health.v1, whose package the light client does without.

Its two messages are on the wire what two of protobuf's own wrappers are: HealthCheckRequest,
{string service = 1}, is a StringValue and HealthCheckResponse, {ServingStatus status = 1}, an Int32Value.
"""

from __future__ import annotations

from typing import Final

from google.protobuf import wrappers_pb2

from cliptune.codec import Call
from cliptune.results import Health

WATCH: Final = "grpc.health.v1.Health/Watch"
ANSWER: Final = wrappers_pb2.Int32Value
_STATUS: Final = {1: Health.SERVING, 2: Health.NOT_SERVING}


def request(service: str) -> wrappers_pb2.StringValue:
    """Of one service; empty: of the daemon as a whole."""
    return wrappers_pb2.StringValue(value=service)


def status(answer: wrappers_pb2.Int32Value) -> Health:
    """What the answer says."""
    return _STATUS.get(answer.value, Health.UNKNOWN)


def check(service: str) -> Call[Health]:
    """One answer, now."""
    return Call(method="grpc.health.v1.Health/Check", request=request(service), answer=ANSWER, parse=status)
