"""Every error class through a real gRPC server with the daemon's interceptors, and back."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from cliptune.errors import (
    CancelledError,
    CliptuneError,
    DeadlineExceededError,
    DiskFullError,
    InternalError,
    UnavailableError,
    all_errors,
    wire_status,
)
from cliptune.v1 import model_pb2, model_pb2_grpc, training_pb2, training_pb2_grpc
from cliptune.wire import error_from_rpc
from cliptune_server.rpc.errors import ErrorInterceptor
from cliptune_server.rpc.telemetry import TelemetryInterceptor

METADATA = {"path": "train.epochs", "allowed": "1 to 10,000 – or «none»", "row": "7"}
MESSAGE = "epochs is −3 in “spec”, which is not allowed"

OTHERS: dict[str, tuple[Callable[[], BaseException], type[CliptuneError]]] = {
    "a bug": (lambda: KeyError("nothing"), InternalError),
    "a timeout": (TimeoutError, DeadlineExceededError),
    "a full disk": (lambda: OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
    "inner work cancelled": (asyncio.CancelledError, CancelledError),
}


def make(name: str) -> BaseException:
    if name in OTHERS:
        return OTHERS[name][0]()
    return all_errors()[name](MESSAGE, **METADATA)


class ProbeModels(model_pb2_grpc.ModelServiceServicer):
    """GetModel raises the error that it is asked for, or waits for ever."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: object
    ) -> model_pb2.GetModelResponse:
        if request.model == "wait":
            self.waiting.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        raise make(request.model)


class ProbeTraining(training_pb2_grpc.TrainingServiceServicer):
    """Streams that answer once and then raise."""

    async def WatchJob(  # noqa: N802
        self, request: training_pb2.WatchJobRequest, context: object
    ) -> AsyncIterator[training_pb2.WatchJobResponse]:
        yield training_pb2.WatchJobResponse()
        raise make(request.job_id)

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[training_pb2.SessionRequest], context: object
    ) -> AsyncIterator[training_pb2.SessionResponse]:
        async for request in request_iterator:
            yield training_pb2.SessionResponse(request_id=request.request_id)
            raise make(request.request_id)


class Probe:
    def __init__(self) -> None:
        self.observed: list[tuple[str, str, float | None]] = []
        self.errors = ErrorInterceptor()
        self.models = ProbeModels()
        self.ended = asyncio.Event()

    def observe(self, method: str, code: str, seconds: float | None) -> None:
        self.observed.append((method, code, seconds))
        self.ended.set()


@pytest.fixture
async def probe() -> AsyncIterator[tuple[Probe, grpc.aio.Channel]]:
    probe = Probe()
    server = grpc.aio.server(interceptors=(TelemetryInterceptor(probe.observe), probe.errors))
    model_pb2_grpc.add_ModelServiceServicer_to_server(probe.models, server)
    training_pb2_grpc.add_TrainingServiceServicer_to_server(ProbeTraining(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield probe, channel
    await server.stop(None)


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


async def test_every_class_arrives_whole_from_a_unary_call(probe: tuple[Probe, grpc.aio.Channel]) -> None:
    stub = model_pb2_grpc.ModelServiceStub(probe[1])
    for name, cls in all_errors().items():
        failed = await failure_of(stub.GetModel(model_pb2.GetModelRequest(model=name)))
        told = error_from_rpc(failed)
        assert type(told) is cls
        assert (told.message, told.metadata) == (MESSAGE, METADATA)
        assert failed.code() is wire_status(cls).grpc


async def test_every_class_arrives_whole_from_a_stream_that_has_answered_before(
    probe: tuple[Probe, grpc.aio.Channel],
) -> None:
    stub = training_pb2_grpc.TrainingServiceStub(probe[1])
    for name, cls in all_errors().items():
        answers = stub.WatchJob(training_pb2.WatchJobRequest(job_id=name))
        assert isinstance(await anext(aiter(answers)), training_pb2.WatchJobResponse)
        told = error_from_rpc(await failure_of(anext(aiter(answers))))
        assert (type(told), told.message, told.metadata) == (cls, MESSAGE, METADATA)


async def test_every_class_arrives_whole_from_a_stream_in_both_directions(
    probe: tuple[Probe, grpc.aio.Channel],
) -> None:
    stub = training_pb2_grpc.TrainingServiceStub(probe[1])
    for name, cls in all_errors().items():
        session = stub.Session()
        await session.write(training_pb2.SessionRequest(request_id=name))
        assert (await session.read()).request_id == name
        told = error_from_rpc(await failure_of(session.read()))
        assert (type(told), told.message, told.metadata) == (cls, MESSAGE, METADATA)


@pytest.mark.parametrize("name", OTHERS)
async def test_no_exception_arrives_as_unknown(name: str, probe: tuple[Probe, grpc.aio.Channel]) -> None:
    cls = OTHERS[name][1]
    unary = model_pb2_grpc.ModelServiceStub(probe[1]).GetModel(model_pb2.GetModelRequest(model=name))
    answers = training_pb2_grpc.TrainingServiceStub(probe[1]).WatchJob(
        training_pb2.WatchJobRequest(job_id=name)
    )
    await anext(aiter(answers))
    for failed in (await failure_of(unary), await failure_of(anext(aiter(answers)))):
        assert failed.code() is wire_status(cls).grpc
        assert type(error_from_rpc(failed)) is cls


async def test_a_deadline_of_the_caller_ends_the_handler_and_is_told_as_such(
    probe: tuple[Probe, grpc.aio.Channel],
) -> None:
    stub = model_pb2_grpc.ModelServiceStub(probe[1])
    failed = await failure_of(stub.GetModel(model_pb2.GetModelRequest(model="wait"), timeout=0.2))
    assert isinstance(error_from_rpc(failed), DeadlineExceededError)
    async with asyncio.timeout(10):
        await probe[0].models.cancelled.wait()


async def test_a_caller_that_leaves_ends_the_handler(probe: tuple[Probe, grpc.aio.Channel]) -> None:
    call = model_pb2_grpc.ModelServiceStub(probe[1]).GetModel(model_pb2.GetModelRequest(model="wait"))
    async with asyncio.timeout(10):
        await probe[0].models.waiting.wait()
        call.cancel()
        await probe[0].models.cancelled.wait()
        await probe[0].ended.wait()
    assert probe[0].observed[-1][:2] == ("cliptune.v1.ModelService/GetModel", "CANCELLED")


async def test_a_drain_fails_what_is_not_answered_in_time_as_unavailable_and_refuses_new_calls(
    probe: tuple[Probe, grpc.aio.Channel],
) -> None:
    stub = model_pb2_grpc.ModelServiceStub(probe[1])
    call = stub.GetModel(model_pb2.GetModelRequest(model="wait"))
    async with asyncio.timeout(10):
        await probe[0].models.waiting.wait()
        await probe[0].errors.drain(0.05)
        assert isinstance(error_from_rpc(await failure_of(call)), UnavailableError)
        refused = await failure_of(stub.GetModel(model_pb2.GetModelRequest(model="SpecError")))
        assert isinstance(error_from_rpc(refused), UnavailableError)


async def test_calls_are_counted_with_their_code_and_only_unary_ones_are_timed(
    probe: tuple[Probe, grpc.aio.Channel],
) -> None:
    stub = model_pb2_grpc.ModelServiceStub(probe[1])
    await failure_of(stub.GetModel(model_pb2.GetModelRequest(model="TextError")))
    await probe[0].ended.wait()
    method, code, seconds = probe[0].observed.pop()
    assert (method, code) == ("cliptune.v1.ModelService/GetModel", "INVALID_ARGUMENT")
    assert seconds is not None
    assert 0 <= seconds < 10

    probe[0].ended.clear()
    watch = training_pb2_grpc.TrainingServiceStub(probe[1]).WatchJob(
        training_pb2.WatchJobRequest(job_id="DataError")
    )
    await anext(aiter(watch))
    await failure_of(anext(aiter(watch)))
    await probe[0].ended.wait()
    assert probe[0].observed == [("cliptune.v1.TrainingService/WatchJob", "INVALID_ARGUMENT", None)]
