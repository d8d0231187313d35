"""grpc.health.v1 over `Readiness`: the whole daemon under "", and each service by the parts that it needs.

A watch is told of each change as it happens, and ends after the one that says the daemon is stopping.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cliptune.errors import NotFoundError
from cliptune_server.readiness import Part, Readiness, Report

_Context = grpc.aio.ServicerContext[Any, Any]
_Status = health_pb2.HealthCheckResponse

# Services are lively before the whole daemon is ready: jobs can be created while the engine starts.
NEEDS: Final[Mapping[str, tuple[Part, ...]]] = {
    "": tuple(Part),
    "cliptune.v1.InferenceService": (Part.ENGINE, Part.MODELS),
    "inference.GRPCInferenceService": (Part.ENGINE, Part.MODELS),
    "cliptune.v1.ModelService": (Part.ENGINE,),
    "cliptune.v1.TrainingService": (Part.JOBS,),
    "cliptune.v1.DataService": (),
}


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers for the services in `NEEDS`."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """Status now. `NotFoundError` for a service that is not here."""
        if request.service not in NEEDS:
            raise NotFoundError(
                f"no service {request.service!r} here; there are {', '.join(filter(None, NEEDS))}"
            )
        return _Status(status=_status(request.service, self._readiness.report()))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Status now and after each change."""
        told = None
        async for report in self._readiness.watch():
            status = _status(request.service, report)
            if status != told:
                told = status
                yield _Status(status=status)


def _status(service: str, report: Report) -> int:
    if service not in NEEDS:
        return int(_Status.SERVICE_UNKNOWN)
    return int(_Status.SERVING if report.of(*NEEDS[service]) else _Status.NOT_SERVING)
