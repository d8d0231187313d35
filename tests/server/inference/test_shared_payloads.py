"""Large images go to the engine beside their message: the same answers, bounded, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from cliptune.errors import ImageDecodeError, InternalError, TensorError, UnavailableError
from cliptune.internal.v1 import engine_pb2
from cliptune.tensors import pack, unpack
from cliptune.v1 import inference_pb2, spec_pb2, tensor_pb2
from cliptune_server.engine import payload as engine_side
from cliptune_server.engine.payload import Payload, pictures
from cliptune_server.inference import payloads as daemon_side
from cliptune_server.inference.engine_process import EngineConfig, EngineProcess
from cliptune_server.inference.engines import _socket_folder
from cliptune_server.inference.payloads import Payloads
from tests.support import images

LARGE = np.random.default_rng(3).integers(0, 255, (400, 500, 3), dtype=np.uint8)
PIXELS = tensor_pb2.Image(pixels=pack(LARGE))
FILE = tensor_pb2.Image(encoded=images.png(size=256))
WAYS = pytest.mark.parametrize(
    "anonymous",
    [
        pytest.param(True, marks=pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")),
        False,
    ],
    ids=["anonymous memory", "files"],
)


def request_of(*images: tensor_pb2.Image, model: str = "m:1") -> inference_pb2.EmbedImagesRequest:
    return inference_pb2.EmbedImagesRequest(model=model, images=images, resolution="", dimensions=0)


def requests() -> list[Any]:
    """One of each kind that has images, large enough."""
    pairs = [inference_pb2.ImageTextPair(image=image, text="a") for image in (PIXELS, FILE)]
    classes = [spec_pb2.ClassPrompts(label=label) for label in ("red", "blue")]
    return [
        request_of(PIXELS, FILE, PIXELS),
        inference_pb2.SimilarityRequest(model="m:1", images=[PIXELS], texts=["a", "b"]),
        inference_pb2.ScorePairsRequest(model="m:1", pairs=pairs),
        inference_pb2.ClassifyRequest(model="m:1", images=[FILE, PIXELS], classes=classes),
    ]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").glob("*")))


def left_in(folder: Path) -> list[Path]:
    return list(folder.glob("payload-*"))


def test_both_ends_speak_of_the_same_place() -> None:
    assert engine_side.METADATA_KEY == daemon_side.METADATA_KEY
    assert engine_side.UNREADABLE == daemon_side.UNREADABLE


@WAYS
@pytest.mark.parametrize("number", range(4))
async def test_a_request_is_parted_from_its_bytes_and_put_together_again(
    tmp_path: Path, anonymous: bool, number: int
) -> None:
    request = requests()[number]
    whole = request.SerializeToString(deterministic=True)
    payloads = Payloads(tmp_path, anonymous=anonymous)
    before = open_files()
    async with payloads.beside(request) as (message, metadata):
        assert message.ByteSize() < 1000
        payload = Payload.told(metadata)
        assert payloads.held_bytes == request.ByteSize()
    assert payload is not None
    assert request.SerializeToString(deterministic=True) == whole
    sent = [pair.image for pair in request.pairs] if number == 2 else request.images
    stripped = [pair.image for pair in message.pairs] if number == 2 else message.images
    for image, picture, bare in zip(sent, pictures(stripped, payload), stripped, strict=True):
        assert bytes(picture.data) == (image.encoded or image.pixels.data)
        assert bare.WhichOneof("source") == image.WhichOneof("source")
        if image.HasField("pixels"):
            np.testing.assert_array_equal(picture.array(), unpack(image.pixels))
    rest = type(request)()
    rest.CopyFrom(request)
    for other in (rest, message):
        other.ClearField("pairs" if number == 2 else "images")
    assert rest == message  # nothing else was lost
    assert payloads.held_bytes == 0
    del payload, picture
    assert open_files() == before
    assert not left_in(tmp_path)


@WAYS
async def test_what_is_small_or_finds_no_room_or_was_given_up_takes_no_memory(
    tmp_path: Path, anonymous: bool
) -> None:
    payloads = Payloads(tmp_path, anonymous=anonymous, total_bytes=PIXELS.ByteSize() + 100)
    small, large = request_of(tensor_pb2.Image(encoded=images.png())), request_of(PIXELS)
    texts = inference_pb2.EmbedTextsRequest(texts=["x" * 300_000])
    for request in (small, texts):
        async with payloads.beside(request) as (message, metadata):
            assert message is request
            assert metadata == ()
    async with payloads.beside(large) as (_, metadata):
        assert metadata
        async with payloads.beside(large) as (message, metadata):
            assert message is large  # the bound
            assert metadata == ()

    async def enter() -> None:
        async with payloads.beside(large):
            await asyncio.Event().wait()

    before = open_files()
    for _ in range(20):
        entering = asyncio.create_task(enter())
        await asyncio.sleep(0)
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()  # those that were being written
    assert payloads.held_bytes == 0
    assert open_files() == before
    assert not left_in(tmp_path)


async def test_a_folder_that_cannot_be_written_leaves_the_socket(tmp_path: Path) -> None:
    payloads = Payloads(tmp_path / "nowhere", anonymous=False)
    request = request_of(PIXELS)
    for _ in range(2):
        async with payloads.beside(request) as (message, metadata):
            assert message is request
            assert metadata == ()
    assert payloads.passed == 0


def test_files_of_a_daemon_that_was_killed_are_swept_away_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with tempfile.TemporaryDirectory(
        prefix="ct-"
    ) as short:  # a socket's path holds about a hundred characters
        monkeypatch.setattr(tempfile, "tempdir", short)
        mine, stale = (Path(short) / f"cliptune-engine-{pid}-x" for pid in (os.getpid(), ended.pid))
        for folder in (mine, stale):
            folder.mkdir()
            (folder / "payload-1-1").write_bytes(bytes(100))
        new = _socket_folder()
        assert {mine, new} == set(Path(short).iterdir())
        assert left_in(mine)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x02" + bytes(7) + b"\xff" * 16, bytes(8) + b"more"])
def test_a_payload_that_is_not_whole_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "payload"
    path.write_bytes(content)
    with pytest.raises(InternalError) as failed:
        Payload.read(str(path))
    assert failed.value.metadata == {"payload": str(path)}


@pytest_asyncio.fixture
async def engine(tmp_path: Path, model_dir: Path) -> AsyncIterator[EngineProcess]:
    engine = await EngineProcess.launch(
        tmp_path / "e.sock", EngineConfig(device="cpu", threads=1, cache_bytes=2**20)
    )
    try:
        request = engine_pb2.LoadRequest(key="m:1", path=str(model_dir))
        await engine.call(lambda stub: stub.Load, request, 60)
        yield engine
    finally:
        await engine.kill()


async def test_the_answers_are_the_same_either_way_and_an_engine_that_cannot_read_it_is_asked_again(
    engine: EngineProcess, tmp_path: Path
) -> None:
    async def ask(*images: tensor_pb2.Image) -> Any:
        return await engine.call(lambda stub: stub.EmbedImages, request_of(*images), 60)

    corrupt = tensor_pb2.Image(encoded=b"no image" * 40_000)
    wrong = tensor_pb2.Image(pixels=tensor_pb2.Tensor(data=bytes(300_000), dtype=3, shape=[2, 2, 3]))
    beside = await ask(PIXELS, corrupt, FILE, wrong, tensor_pb2.Image())
    assert engine.payloads.passed == 1
    for image, error in ((corrupt, ImageDecodeError), (wrong, TensorError)):
        with pytest.raises(error):
            await ask(image)
    assert engine.payloads.passed == 3

    engine.payloads = Payloads(tmp_path, anonymous=False)  # type: ignore[misc]
    assert (await ask(PIXELS, FILE)).profile.cached_items == 2  # the same bytes, by another way

    class Elsewhere(Payloads):
        def _place(self) -> Any:
            place = super()._place()
            place.path += "-lost"
            return place

    engine.payloads = Elsewhere(tmp_path)  # type: ignore[misc]
    answer = await ask(PIXELS, corrupt, FILE, wrong, tensor_pb2.Image())
    assert answer.embeddings == beside.embeddings
    assert answer.errors == beside.errors
    await ask(PIXELS)
    assert engine.payloads.passed == 1  # it is not tried again


async def test_an_engine_that_is_killed_in_the_middle_leaves_nothing_behind(
    engine: EngineProcess, tmp_path: Path
) -> None:
    engine.payloads = Payloads(tmp_path, anonymous=False)  # type: ignore[misc]
    before = open_files()
    many = request_of(*[PIXELS] * 64)
    asking = [asyncio.create_task(engine.call(lambda stub: stub.EmbedImages, many, 60)) for _ in range(4)]
    async with asyncio.timeout(60):
        while engine.payloads.passed < 4:
            await engine.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), 10)
    os.kill(engine.pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {UnavailableError}
    assert engine.payloads.held_bytes == 0
    assert not left_in(tmp_path)
    await engine.kill()
    assert open_files() <= before
