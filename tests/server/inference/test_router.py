"""The router over a real engine: references, hot swap, limits, and the bulk stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio

from cliptune.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    ModelStateError,
    RequestTooLargeError,
    from_detail,
)
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, inference_pb2_grpc, spec_pb2, tensor_pb2
from cliptune_server.inference.engine_process import EngineConfig
from cliptune_server.inference.engines import EngineSupervisor
from cliptune_server.inference.router import Router
from cliptune_server.rpc.inference import InferenceServicer
from tests.server.inference.catalog import MemoryCatalog, supervising
from tests.support import images

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(model_dir: Path, other_model_dir: Path) -> AsyncIterator[EngineSupervisor]:
    async with supervising(EngineConfig(device="cpu", threads=1, standby=False)) as (engines, _):
        await engines.load("m:1", model_dir)
        await engines.load("m:2", other_model_dir)
        yield engines


@pytest.fixture
def catalog() -> MemoryCatalog:
    catalog = MemoryCatalog()
    catalog.keys |= {"": "m:1", "m": "m:2", "m:1": "m:1", "m:2": "m:2", "m@prod": "m:1"}
    return catalog


@pytest.fixture
def router(engines: EngineSupervisor, catalog: MemoryCatalog) -> Router:
    return Router(engines, catalog)


def texts(model: str, *items: str) -> inference_pb2.EmbedTextsRequest:
    return inference_pb2.EmbedTextsRequest(model=model, texts=items)


async def test_a_reference_leads_to_its_version_and_the_answer_names_it(router: Router) -> None:
    answers = {model: await router.embed_texts(texts(model, "a circle")) for model in ("", "m", "m@prod")}
    assert {model: answer.model for model, answer in answers.items()} == {
        "": "m:1",
        "m": "m:2",
        "m@prod": "m:1",
    }
    rows = {answer.model: unpack(answer.embeddings) for answer in answers.values()}
    assert not np.allclose(rows["m:1"], rows["m:2"])
    with pytest.raises(ModelNotFoundError):
        await router.embed_texts(texts("nobody", "a circle"))


async def test_no_request_fails_while_an_alias_moves(
    router: Router, catalog: MemoryCatalog, engines: EngineSupervisor, model_dir: Path
) -> None:
    await engines.load("swap:1", model_dir)
    catalog.keys["swap@prod"] = "swap:1"
    answered: list[str] = []
    moved = asyncio.Event()

    async def ask() -> None:
        while len(answered) < 20 or answered[-1] != "swap:2":
            answered.append((await router.embed_texts(texts("swap@prod", "a circle"))).model)
            if len(answered) == 10:
                moved.set()

    asking = asyncio.gather(*(ask() for _ in range(4)))
    await moved.wait()
    await engines.load("swap:2", model_dir)
    catalog.keys["swap@prod"] = "swap:2"
    await engines.unload("swap:1")
    async with asyncio.timeout(30):
        await asking
    assert answered[0] == "swap:1"
    assert answered[-1] == "swap:2"
    await engines.unload("swap:2")


async def test_a_version_that_was_unloaded_after_it_was_looked_up_is_looked_up_again(
    engines: EngineSupervisor,
) -> None:
    class Moving(MemoryCatalog):
        """Answers with a version that is unloaded before the engine is asked."""

        asked = 0

        async def resolve(self, reference: str) -> str:
            self.asked += 1
            return "gone:1" if self.asked == 1 else await super().resolve(reference)

    catalog = Moving()
    catalog.keys["m@prod"] = "m:1"
    assert (await Router(engines, catalog).embed_texts(texts("m@prod", "a circle"))).model == "m:1"
    catalog.keys["m@prod"] = "gone:1"
    with pytest.raises(ModelStateError):
        await Router(engines, catalog).embed_texts(texts("m@prod", "a circle"))


async def test_a_request_without_time_or_too_large_never_reaches_the_engine(
    engines: EngineSupervisor, catalog: MemoryCatalog
) -> None:
    router = Router(engines, catalog, message_bytes=1024 * 1024)
    with pytest.raises(DeadlineExceededError):
        await router.embed_texts(texts("m", "a circle"), timeout_s=0.0)
    big = inference_pb2.EmbedImagesRequest(model="m", images=[tensor_pb2.Image(encoded=b"x" * 1_100_000)])
    with pytest.raises(RequestTooLargeError) as refused:
        await router.embed_images(big)
    assert int(refused.value.metadata["limit"]) < 1024 * 1024


async def stream(
    router: Router, requests: list[inference_pb2.EmbedStreamRequest]
) -> list[inference_pb2.EmbedStreamResponse]:
    async def send() -> AsyncIterator[inference_pb2.EmbedStreamRequest]:
        for request in requests:
            yield request

    async with asyncio.timeout(60):
        return [response async for response in router.embed_stream(send())]


async def test_every_item_of_a_bulk_stream_is_answered_with_its_vector_or_its_error(router: Router) -> None:
    png, broken = images.png(), images.truncated_jpeg()
    requests: list[inference_pb2.EmbedStreamRequest] = []
    for number in range(600):
        request = inference_pb2.EmbedStreamRequest(id=str(number), model=("m:1", "m:2")[number // 7 % 2])
        if number % 5 == 0:
            request.image.encoded = broken if number % 25 == 0 else png
        elif number % 11 == 0:
            request.text = " "
        elif number % 13 == 0:
            request.model = "nobody"
            request.text = "a circle"
        elif number % 17 != 0:
            request.text = f"circle {number}"
        requests.append(request)
    answers = {answer.id: answer for answer in await stream(router, requests)}
    assert len(answers) == 600
    expected = {
        model: unpack((await router.embed_texts(texts(model, "circle 1", "circle 8"))).embeddings)
        for model in ("m:1", "m:2")
    }
    np.testing.assert_allclose(unpack(answers["1"].embedding), expected["m:1"][0], atol=1e-6)
    np.testing.assert_allclose(unpack(answers["8"].embedding), expected["m:2"][1], atol=1e-6)
    for number in range(600):
        answer, reason = answers[str(number)], ""
        if number % 5 == 0:
            reason = "ImageDecodeError" if number % 25 == 0 else ""
        elif number % 11 == 0:
            reason = "TextError"
        elif number % 13 == 0:
            reason = "ModelNotFoundError"
        elif number % 17 == 0:
            reason = "InvalidInputError"
        assert answer.error.reason == reason, number
        if not reason:
            assert answer.model == requests[number].model
            assert unpack(answer.embedding).shape == (32,)


async def test_one_stream_is_answered_by_one_version_also_when_its_alias_moves(
    router: Router, catalog: MemoryCatalog
) -> None:
    answered = asyncio.Semaphore(1)

    async def send() -> AsyncIterator[inference_pb2.EmbedStreamRequest]:
        for number, model in enumerate(("m@prod", "m@prod", "m:1", "m:2")):
            await answered.acquire()
            yield inference_pb2.EmbedStreamRequest(id=str(number), model=model, text="a circle")

    models = []
    async with asyncio.timeout(30):
        async for response in router.embed_stream(send()):
            models.append(response.model)
            assert catalog.held["m:1"] == 1
            catalog.keys["m@prod"] = "m:2"
            answered.release()
    assert models == ["m:1", "m:1", "m:1", "m:2"]
    assert not +catalog.held
    assert (await router.embed_texts(texts("m@prod", "a circle"))).model == "m:2"


async def test_a_bulk_stream_answers_a_client_that_waits_for_each_answer(router: Router) -> None:
    answered = asyncio.Semaphore(1)

    async def send() -> AsyncIterator[inference_pb2.EmbedStreamRequest]:
        for number in range(10):
            await answered.acquire()
            yield inference_pb2.EmbedStreamRequest(id=str(number), model="m:1", text="a circle")

    found = []
    async with asyncio.timeout(30):
        async for response in router.embed_stream(send()):
            found.append(response.id)
            answered.release()
    assert found == [str(number) for number in range(10)]


async def test_a_client_that_takes_no_answers_is_not_read_without_end(router: Router) -> None:
    sent = 0

    async def send() -> AsyncIterator[inference_pb2.EmbedStreamRequest]:
        nonlocal sent
        for number in range(5000):
            sent += 1
            yield inference_pb2.EmbedStreamRequest(id=str(number), model="m:1", text="a circle")

    answers = router.embed_stream(send())
    first = await anext(answers)
    assert from_detail(first.error).message == ""
    held = 0
    while held != sent:  # until reading stands still
        held = sent
        await router.embed_texts(texts("m:1", *(f"circle {number}" for number in range(50))))
    assert sent < 2000
    count = 1
    async with asyncio.timeout(60):
        async for _ in answers:
            count += 1
    assert count == 5000


async def test_the_servicer_is_the_router_over_grpc(router: Router, tmp_path: Path) -> None:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(router), server)
    target = f"unix:{tmp_path}/s"
    server.add_insecure_port(target)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            image = tensor_pb2.Image(encoded=images.png())
            classes = [spec_pb2.ClassPrompts(label=label) for label in ("circle", "square")]
            request = inference_pb2.ClassifyRequest(model="m@prod", images=[image], classes=classes)
            over_grpc = await stub.Classify(request, timeout=30)
            directly = await router.classify(request)
            assert 0 < directly.profile.engine_seconds < directly.profile.daemon_seconds
            for answer in (over_grpc, directly):
                answer.ClearField("profile")
            assert over_grpc == directly
            pairs = inference_pb2.ScorePairsRequest(
                pairs=[inference_pb2.ImageTextPair(image=image, text="circle")]
            )
            matrix = inference_pb2.SimilarityRequest(images=[image], texts=["circle"])
            scored, similar = await stub.ScorePairs(pairs), await stub.Similarity(matrix)
            np.testing.assert_allclose(unpack(scored.scores), unpack(similar.scores)[0], atol=1e-6)
            (row,) = unpack(
                (await stub.EmbedImages(inference_pb2.EmbedImagesRequest(images=[image]))).embeddings
            )
            (text_row,) = unpack((await stub.EmbedTexts(texts("m:1", "circle"))).embeddings)
            assert unpack(scored.scores)[0] == pytest.approx(float(row @ text_row), abs=1e-5)
            call = stub.EmbedStream()
            await call.write(inference_pb2.EmbedStreamRequest(id="one", model="m:1", text="circle"))
            answer = await call.read()
            np.testing.assert_allclose(unpack(answer.embedding), text_row, atol=1e-6)
            await call.done_writing()
            assert await call.read() == grpc.aio.EOF
    finally:
        await server.stop(5)
