"""More than the engine can decode: what it takes in is answered in time, the others hear so at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cliptune.errors import DeadlineExceededError, OverloadedError
from cliptune.internal.v1 import engine_pb2
from cliptune.v1 import inference_pb2, tensor_pb2
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


async def test_what_cannot_be_decoded_in_time_is_refused_before_the_queue_is_worked_off(
    engine: EngineProcess,
) -> None:
    # Of a large file the decoding takes nearly all the time, and the forward of a tiny model next to none.
    picture = tensor_pb2.Image(encoded=images.jpeg(size=1500))
    one = inference_pb2.EmbedImagesRequest(model="m:1", images=[picture])
    began_s = time.monotonic()
    for _ in range(8):
        await engine.call(lambda stub: stub.EmbedImages, one, 60)
    alone_s = (time.monotonic() - began_s) / 8
    endings: list[str] = []
    retry_after_s: list[float] = []

    async def ask() -> None:
        try:
            await engine.call(lambda stub: stub.EmbedImages, one, 12 * alone_s)
        except OverloadedError as error:
            endings.append("refused")
            retry_after_s.append(float(error.metadata["retry_after_s"]))
        except DeadlineExceededError:  # taken in by what a file took so far; then the machine had other work
            endings.append("late")
        else:
            endings.append("answered")

    await asyncio.gather(*(ask() for _ in range(48)))
    assert len(endings) == 48
    assert endings.count("answered") >= 1
    assert endings.index("refused") < len(endings) - 1 - endings[::-1].index("answered")
    assert min(retry_after_s) >= 0.1
    status = await engine.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), 10)
    assert status.shed_requests == endings.count("refused")
    await engine.call(lambda stub: stub.EmbedImages, one, 60)  # and is open again
