"""Every error class crosses both transports and comes back as itself, its metadata whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent import futures

import grpc
import grpc.aio
import pytest

from cliptune import wire
from cliptune.errors import (
    CliptuneError,
    InternalError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
    all_errors,
    from_detail,
    to_detail,
    wire_status,
)

ERRORS = sorted(all_errors().values(), key=lambda cls: cls.__name__)


def example(cls: type[CliptuneError]) -> CliptuneError:
    return cls("train.batch_size is 1: zu klein – 太小", path="train.batch_size", allowed=">= 2", row=7)


def same(left: CliptuneError, right: CliptuneError) -> bool:
    return type(left) is type(right) and left.message == right.message and left.metadata == right.metadata


def serve(handler: Callable[[bytes, grpc.ServicerContext], bytes]) -> tuple[grpc.Server, str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    methods = {"Call": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Peer", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def abort(request: bytes, context: grpc.ServicerContext) -> bytes:
    """Fails with the class that the request names."""
    error = example(all_errors()[request.decode()])
    context.set_trailing_metadata(((wire.DETAILS_KEY, wire.status_details(error)),))
    context.abort(wire_status(error).grpc, wire.status_message(error))
    raise AssertionError


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_survives_problem_json(cls: type[CliptuneError]) -> None:
    body = json.loads(json.dumps(wire.problem(example(cls), "/v1/jobs")))
    assert body["status"] == wire_status(cls).http
    assert body["instance"] == "/v1/jobs"
    assert body["title"]
    assert same(wire.error_from_problem(body), example(cls))


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_survives_a_field_of_a_message(cls: type[CliptuneError]) -> None:
    assert same(from_detail(to_detail(example(cls))), example(cls))


async def test_every_error_survives_a_real_grpc_call_sync_and_async() -> None:
    server, address = serve(abort)
    with grpc.insecure_channel(address) as channel:
        for cls in ERRORS:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/peer.Peer/Call")(cls.__name__.encode())
            assert caught.value.code() is wire_status(cls).grpc
            assert same(wire.error_from_rpc(caught.value), example(cls))
    async with grpc.aio.insecure_channel(address) as channel:
        for cls in ERRORS:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await channel.unary_unary("/peer.Peer/Call")(cls.__name__.encode())
            assert same(wire.error_from_rpc(failed.value), example(cls))
    server.stop(0).wait()


def test_an_error_of_any_length_fits_what_a_grpc_peer_accepts() -> None:
    long = NotFoundError("ü" * 100_000, **{f"key{i}": "x" * 5_000 for i in range(20)})

    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata(((wire.DETAILS_KEY, wire.status_details(long)),))
        context.abort(wire_status(long).grpc, wire.status_message(long))
        raise AssertionError

    server, address = serve(refuse)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/peer.Peer/Call")(b"")
    server.stop(0).wait()
    told = wire.error_from_rpc(caught.value)
    assert type(told) is NotFoundError
    assert told.message.endswith("…")
    assert told.metadata["key0"].startswith("xxx")


def test_a_status_without_our_details_is_the_widest_class_of_that_status() -> None:
    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "a proxy says no")
        raise AssertionError

    server, address = serve(refuse)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/peer.Peer/Call")(b"")
    server.stop(0).wait()
    told = wire.error_from_rpc(caught.value)
    assert type(told) is OverloadedError
    assert told.message == "a proxy says no"


def test_a_problem_that_is_not_ours_is_the_widest_class_of_its_status() -> None:
    assert type(wire.error_from_problem({"status": 404, "title": "Not Found"})) is NotFoundError
    assert type(wire.error_from_problem({"status": 502})) is UnavailableError
    assert type(wire.error_from_problem({"status": 418})) is InternalError


def test_bytes_that_are_no_details_are_no_error_of_ours() -> None:
    assert wire.error_from_details(b"\xff\xff") is None
    assert wire.error_from_details(b"") is None
