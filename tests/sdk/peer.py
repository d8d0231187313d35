"""A real gRPC server under a test's control: it counts attempts and fails when told to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from cliptune.v1 import data_pb2_grpc, inference_pb2_grpc, model_pb2_grpc, training_pb2, training_pb2_grpc

Handler = Callable[[Any, grpc.ServicerContext, int], Any]
LIMIT_BYTES = 10_000_000
STREAMS = {"WatchJob", "Session", "EmbedStream"}


class Peer:
    """Answers "Method" with its handler, called with the request, the context and the attempt's number."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.handlers: dict[str, Handler] = {}
        self.address = ""

    def answer(self, method: str) -> Callable[[Any, grpc.ServicerContext], Any]:
        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            self.attempts[method] += 1
            handler = self.handlers.get(method, away)
            return handler(request, context, self.attempts[method])

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self.attempts[method] += 1
            yield from self.handlers[method](request, context, self.attempts[method])

        return stream if method in STREAMS else unary


def away(request: Any, context: grpc.ServicerContext, attempt: int) -> Any:
    """Never there."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "away")


def away_until(attempts: int, answer: Any) -> Handler:
    """There from this attempt on."""

    def handler(request: Any, context: grpc.ServicerContext, attempt: int) -> Any:
        if attempt < attempts:
            away(request, context, attempt)
        return answer

    return handler


@contextmanager
def running_peer() -> Iterator[Peer]:
    """A peer on a free port."""
    peer = Peer()
    server = grpc.server(
        futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", LIMIT_BYTES)]
    )
    for module, service in (
        (training_pb2_grpc, "TrainingService"),
        (model_pb2_grpc, "ModelService"),
        (inference_pb2_grpc, "InferenceService"),
        (data_pb2_grpc, "DataService"),
    ):
        servicer = getattr(module, f"{service}Servicer")()
        for method in [name for name in dir(servicer) if name[0].isupper()]:
            setattr(servicer, method, peer.answer(method))
        getattr(module, f"add_{service}Servicer_to_server")(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    peer.address = f"127.0.0.1:{port}"
    try:
        yield peer
    finally:
        server.stop(0).wait()


def events(numbers: range) -> Iterator[training_pb2.WatchJobResponse]:
    """Log events with these numbers."""
    for number in numbers:
        event = {"job_id": "j", "number": number, "log": {"message": f"line {number}"}}
        yield training_pb2.WatchJobResponse(event=event)


def last_event(number: int) -> training_pb2.WatchJobResponse:
    """The job succeeded."""
    event = {"job_id": "j", "number": number, "state": {"state": "JOB_STATE_SUCCEEDED"}}
    return training_pb2.WatchJobResponse(event=event)
