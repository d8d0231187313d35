"""The gRPC server: every service behind one pair of interceptors, with health and reflection.

Enters: servicers, made by `daemon.py`. Leaves: answers on one port. A stop takes no new calls, waits for
those in flight, and fails the rest with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cliptune.internal.open_inference import open_inference_pb2, open_inference_pb2_grpc
from cliptune.v1 import (
    data_pb2,
    data_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from cliptune_server import listening
from cliptune_server.config import Limits
from cliptune_server.readiness import Readiness
from cliptune_server.rpc.errors import ErrorInterceptor
from cliptune_server.rpc.health import HealthServicer
from cliptune_server.rpc.readable import ReadableMessages
from cliptune_server.rpc.telemetry import TelemetryInterceptor

SERVICES: Final = (
    *(service.full_name for service in training_pb2.DESCRIPTOR.services_by_name.values()),
    *(service.full_name for service in inference_pb2.DESCRIPTOR.services_by_name.values()),
    *(service.full_name for service in model_pb2.DESCRIPTOR.services_by_name.values()),
    *(service.full_name for service in open_inference_pb2.DESCRIPTOR.services_by_name.values()),
    *(service.full_name for service in data_pb2.DESCRIPTOR.services_by_name.values()),
)
# Above the grace of our own drain, which ends calls with an answer before gRPC cuts them off without one.
_CUT_OFF_MARGIN_S: Final = 3.0


class RpcServer:
    """Bind it, add the servicers, start it. Made on the running loop."""

    def __init__(
        self,
        *,
        limits: Limits,
        readiness: Readiness,
        observe: Callable[[str, str, float | None], None],
    ) -> None:
        self._errors = ErrorInterceptor()
        self.server: Final = grpc.aio.server(
            interceptors=(TelemetryInterceptor(observe), self._errors, ReadableMessages()),
            options=_options(limits),
        )
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(readiness), self.server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    def add(
        self,
        *,
        training: training_pb2_grpc.TrainingServiceServicer,
        inference: inference_pb2_grpc.InferenceServiceServicer,
        open_inference: open_inference_pb2_grpc.GRPCInferenceServiceServicer,
        models: model_pb2_grpc.ModelServiceServicer,
        data: data_pb2_grpc.DataServiceServicer,
    ) -> None:
        """The services that need the daemon's objects; before `start`."""
        training_pb2_grpc.add_TrainingServiceServicer_to_server(training, self.server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self.server)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, self.server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(models, self.server)
        data_pb2_grpc.add_DataServiceServicer_to_server(data, self.server)

    def bind(self, host: str, port: int) -> int:
        """Take the port (0: any free one) and return it. `ConflictError` when it is in use."""
        try:
            return self.server.add_insecure_port(listening.address(host, port))
        except RuntimeError as error:
            # gRPC does not say why; a socket of our own does.
            listening.bind(host, port, "grpc").close()
            raise listening.refusal(OSError(str(error)), host, port, "grpc") from None

    async def start(self) -> None:
        """Answer calls."""
        await self.server.start()

    async def stop(self, grace_s: float) -> None:
        """Answer what is in flight within `grace_s`; the rest fails with UNAVAILABLE."""
        closing = asyncio.create_task(self.server.stop(grace_s + _CUT_OFF_MARGIN_S))
        await self._errors.drain(grace_s)
        # Every call has been answered: what gRPC still holds open is no reason to use up a long grace.
        await self.server.stop(_CUT_OFF_MARGIN_S)
        await closing

    def end_sessions(self) -> None:
        """The jobs have stopped: a session that is still open has nothing left to say."""
        self._errors.cut_off("cliptune.v1.TrainingService/Session")


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
        # Otherwise a second daemon on the same port would quietly get half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", round(limits.keepalive_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(limits.keepalive_min_ping_s * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(limits.keepalive_min_ping_s * 1000)),
    ]
