"""What is interactive is answered while more bulk waits than the engine can take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from cliptune.errors import InvalidInputError
from cliptune.internal.v1 import engine_pb2, engine_pb2_grpc
from cliptune.v1 import inference_pb2, tensor_pb2
from cliptune.wire import error_from_rpc
from cliptune_server.inference.engine_process import EngineConfig, EngineProcess
from tests.support import images

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> AsyncIterator[EngineProcess]:
    socket = tmp_path_factory.mktemp("e") / "e.sock"
    engine = await EngineProcess.launch(socket, EngineConfig(device="cpu", threads=1, cache_bytes=0))
    try:
        request = engine_pb2.LoadRequest(key="m:1", path=str(model_dir))
        await engine.call(lambda stub: stub.Load, request, 60)
        yield engine
    finally:
        await engine.kill()


async def test_an_interactive_image_overtakes_bulk_that_fills_every_place(engine: EngineProcess) -> None:
    picture = tensor_pb2.Image(encoded=images.jpeg(size=512))
    many = inference_pb2.EmbedImagesRequest(model="m:1", images=[picture] * 600)
    bulk = asyncio.create_task(engine.call(lambda stub: stub.EmbedImages, many, 120, bulk=True))
    while True:
        status = await engine.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), 10)
        if any(queue.items > 5 for queue in status.queues):
            break
        assert not bulk.done()
    one = inference_pb2.EmbedImagesRequest(model="m:1", images=[picture])
    for _ in range(3):
        await engine.call(lambda stub: stub.EmbedImages, one, 60)
    assert not bulk.done()
    assert not (await bulk).errors


async def test_an_unknown_priority_is_refused_with_what_is_allowed(engine: EngineProcess) -> None:
    stub = engine_pb2_grpc.EngineServiceStub(engine._channel)  # type: ignore[arg-type]
    request = inference_pb2.EmbedTextsRequest(model="m:1", texts=["a"])
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.EmbedTexts(request, metadata=(("cliptune-priority", "urgent"),), timeout=10)
    error = error_from_rpc(failed.value)
    assert isinstance(error, InvalidInputError)
    assert error.metadata["allowed"] == "interactive, bulk"
