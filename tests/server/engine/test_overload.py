"""More than the engine can decode: what it takes in is answered in time, the others hear so at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cliptune.errors import OverloadedError
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


async def test_what_cannot_be_decoded_in_time_is_refused_at_once_and_what_is_taken_in_is_answered(
    engine: EngineProcess,
) -> None:
    # Of a large file the decoding takes nearly all the time, and the forward of a tiny model next to none.
    picture = tensor_pb2.Image(encoded=images.jpeg(size=1500))
    one = inference_pb2.EmbedImagesRequest(model="m:1", images=[picture])
    began_s = time.monotonic()
    for _ in range(8):
        await engine.call(lambda stub: stub.EmbedImages, one, 60)
    alone_s = (time.monotonic() - began_s) / 8
    deadline_s = 12 * alone_s
    refused_s: list[float] = []
    retry_after_s: list[float] = []

    async def ask() -> float | None:
        asked_s = time.monotonic()
        try:
            await engine.call(lambda stub: stub.EmbedImages, one, deadline_s)
        except OverloadedError as error:
            refused_s.append(time.monotonic() - asked_s)
            retry_after_s.append(float(error.metadata["retry_after_s"]))
            return None
        return time.monotonic() - asked_s

    found = await asyncio.gather(*(ask() for _ in range(48)))
    answered = [took_s for took_s in found if took_s is not None]
    assert len(answered) >= 4
    assert len(refused_s) >= 30
    assert max(refused_s) < deadline_s / 2
    assert 0.1 <= min(retry_after_s) <= max(retry_after_s) < 100 * alone_s + 0.1
    status = await engine.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), 10)
    assert status.shed_requests == len(refused_s)
    await engine.call(lambda stub: stub.EmbedImages, one, deadline_s)  # and is open again
