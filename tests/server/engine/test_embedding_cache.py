"""What is remembered by its content, and answers that come from there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from cliptune.errors import InvalidInputError, OverloadedError
from cliptune.internal.v1 import engine_pb2
from cliptune.tensors import pack, unpack
from cliptune.v1 import inference_pb2, spec_pb2, tensor_pb2
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_server.engine.admission import Admission, AdmissionLimits
from cliptune_server.engine.cache import EmbeddingCache, image_digests, text_digests
from cliptune_server.engine.expectation import Expected
from cliptune_server.engine.payload import pictures
from cliptune_server.inference.engine_process import EngineConfig, EngineProcess
from tests.support import images

ROW_BYTES = 8 * 4 + 400


def row(value: float) -> np.ndarray:  # type: ignore[type-arg]
    return np.full(8, value, np.float32)


def test_rows_are_remembered_within_their_bytes_and_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache(2 * ROW_BYTES)
    cache.put("m", b"a", row(1))
    cache.put("m", b"b", row(2))
    assert cache.get("m", b"a") is not None
    cache.put("m", b"c", row(3))
    assert cache.get("m", b"b") is None
    assert (len(cache), cache.bytes, cache.hits, cache.misses) == (2, 2 * ROW_BYTES, 1, 1)
    cache.forget("m")
    assert (len(cache), cache.bytes) == (0, 0)


def test_another_version_has_rows_of_its_own_and_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = EmbeddingCache(10_000)
    cache.put("m:1", b"a", row(1))
    assert cache.get("m:2", b"a") is None
    nothing = EmbeddingCache(0)
    nothing.put("m:1", b"a", row(1))
    assert (nothing.on, len(nothing)) == (False, 0)
    with pytest.raises(InvalidInputError, match="-1"):
        EmbeddingCache(-1)


def test_a_batch_is_not_kept_alive_by_one_of_its_rows() -> None:
    cache = EmbeddingCache(10_000)
    batch = np.zeros((1000, 8), np.float32)
    cache.put("m", b"a", batch[3])
    found = cache.get("m", b"a")
    assert found is not None
    assert found.base is None


def test_digests_tell_content_kind_type_and_shape_apart() -> None:
    pixels = np.arange(48, dtype=np.uint8)
    many = [
        tensor_pb2.Image(encoded=pixels.tobytes()),
        tensor_pb2.Image(pixels=pack(pixels.reshape(4, 4, 3))),
        tensor_pb2.Image(pixels=pack(pixels.reshape(2, 8, 3))),
        tensor_pb2.Image(pixels=pack(pixels.view(np.float32).reshape(4, 1, 3))),
    ]
    texts = ["a", "b", pixels.tobytes().decode("latin-1")]
    digests = [*image_digests(pictures(many)), *text_digests(texts)]
    assert len(set(digests)) == len(digests)
    assert image_digests(pictures(many)) == image_digests(pictures(many))


def test_a_request_that_cannot_be_answered_in_its_time_is_shed_with_a_time_to_come_back() -> None:
    admission = Admission(AdmissionLimits(), backlog_s=lambda: 3.0)
    admission.check_time(Expected(own_s=5.0, wait_s=0.0), 1.0)  # alone: the estimate is measured again
    admission.check_time(Expected(own_s=0.2, wait_s=0.47), 1.0)
    with pytest.raises(OverloadedError) as refused:
        admission.check_time(Expected(own_s=0.2, wait_s=3.0), 1.0)
    assert refused.value.metadata["retry_after_s"] == "4.2"  # when so large a part of its time is enough
    assert admission.shed == 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> AsyncIterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("e")
    clip = load_exported(model_dir)
    export_model(clip, folder / "cut", manifest_of(clip, matryoshka_dims=(8, 16)))
    engine = await EngineProcess.launch(folder / "e.sock", EngineConfig(device="cpu", threads=1))
    try:
        for key, path in (("m:1", model_dir), ("m:2", folder / "cut")):
            request = engine_pb2.LoadRequest(key=key, path=str(path))
            await engine.call(lambda stub: stub.Load, request, 60)
        yield engine
    finally:
        await engine.kill()


async def embed(
    engine: EngineProcess, texts: list[str], model: str = "m:1", dimensions: int = 0
) -> inference_pb2.EmbedTextsResponse:
    request = inference_pb2.EmbedTextsRequest(model=model, texts=texts, dimensions=dimensions)
    return await engine.call(lambda stub: stub.EmbedTexts, request, 60)


def forwards(status: engine_pb2.StatusResponse) -> dict[tuple[str, str], int]:
    return {(queue.model, queue.tower): queue.items for queue in status.queues}


async def status(engine: EngineProcess) -> engine_pb2.StatusResponse:
    return await engine.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), 10)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_same_content_is_forwarded_once_by_each_version(engine: EngineProcess) -> None:
    encoded = [tensor_pb2.Image(encoded=images.png("red")), tensor_pb2.Image(encoded=images.png("blue"))]
    first: dict[str, inference_pb2.EmbedImagesResponse] = {}
    before = await status(engine)
    for model in ("m:1", "m:2", "m:1"):
        request = inference_pb2.EmbedImagesRequest(model=model, images=encoded)
        answer = await engine.call(lambda stub: stub.EmbedImages, request, 60)
        again = first.setdefault(model, answer)
        assert answer.embeddings == again.embeddings
        assert answer.profile.cached_items == (0 if answer is again else 2)
    after = await status(engine)
    assert forwards(after)["m:1", "image"] - forwards(before)["m:1", "image"] == 2
    assert forwards(after)["m:2", "image"] - forwards(before)["m:2", "image"] == 2
    assert (after.cache.hits - before.cache.hits, after.cache.misses - before.cache.misses) == (2, 4)
    assert after.cache.bytes > before.cache.bytes


@pytest.mark.asyncio(loop_scope="module")
async def test_what_failed_is_not_remembered(engine: EngineProcess) -> None:
    for _ in range(2):
        answer = await embed(engine, ["fine", ""])
        assert [error.index for error in answer.errors] == [1]


@pytest.mark.asyncio(loop_scope="module")
async def test_repeated_classification_runs_no_text_forward(engine: EngineProcess) -> None:
    classes = [spec_pb2.ClassPrompts(label=label) for label in ("cracked", "whole")]
    counts = []
    for colour in ("red", "green", "yellow"):
        request = inference_pb2.ClassifyRequest(
            model="m:1", images=[tensor_pb2.Image(encoded=images.png(colour, "square"))], classes=classes
        )
        await engine.call(lambda stub: stub.Classify, request, 60)
        counts.append(forwards(await status(engine))["m:1", "text"])
    assert counts[1] == counts[2] == counts[0]


@pytest.mark.asyncio(loop_scope="module")
async def test_tokens_are_counted_with_start_and_end_and_without_padding(engine: EngineProcess) -> None:
    answer = await embed(engine, ["a red circle", "crack", ""])
    assert answer.tokens == (3 + 2) + (1 + 2)


@pytest.mark.asyncio(loop_scope="module")
async def test_an_embedding_is_cut_only_to_what_its_model_was_trained_for(engine: EngineProcess) -> None:
    whole = unpack((await embed(engine, ["a red circle"], "m:2")).embeddings)
    cut = unpack((await embed(engine, ["a red circle"], "m:2", 8)).embeddings)
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8]), atol=1e-6)
    np.testing.assert_array_equal(
        whole, unpack((await embed(engine, ["a red circle"], "m:2", 32)).embeddings)
    )
    for model, dimensions, allowed in (("m:2", 9, "8, 16, 32"), ("m:1", 8, "32"), ("m:2", -1, "8, 16, 32")):
        with pytest.raises(InvalidInputError) as refused:
            await embed(engine, ["a red circle"], model, dimensions)
        assert refused.value.metadata == {"path": "dimensions", "allowed": allowed}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_profile_tells_where_the_time_went(engine: EngineProcess) -> None:
    profile = (await embed(engine, ["a text that nobody sent", "and another"])).profile
    assert profile.decode_seconds > 0
    assert profile.forward_seconds > 0
    assert profile.engine_seconds >= profile.forward_seconds
    assert profile.batch_items == 2
