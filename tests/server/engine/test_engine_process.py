"""One real engine process for the whole file, asked over its socket."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import pytest_asyncio
import torch
from opentelemetry import trace

from cliptune.errors import (
    CliptuneError,
    DeadlineExceededError,
    ImageDecodeError,
    ImageSizeError,
    InternalError,
    InvalidInputError,
    ModelNotFoundError,
    ModelStateError,
    RequestTooLargeError,
    TensorError,
    TextError,
)
from cliptune.internal.v1 import engine_pb2
from cliptune.tensors import pack, unpack
from cliptune.tracing import tracer
from cliptune.v1 import inference_pb2, spec_pb2, tensor_pb2
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_server.inference.engine_process import EngineConfig, EngineProcess
from tests.server.engine.collector import Collector, collecting
from tests.support import images

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = ["a red circle", "a blue square", "a green triangle on a noisy ground", "crack"]
FILES = [
    images.png("red", "circle"),
    images.jpeg("blue", "square", size=97),
    images.jpeg("green", "triangle"),
]


@pytest.fixture(scope="module")
def collector() -> Any:
    with collecting() as collector:
        yield collector


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector, model_dir: Path, other_model_dir: Path
) -> AsyncIterator[EngineProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        engine = await EngineProcess.launch(
            tmp_path_factory.mktemp("e") / "e.sock", EngineConfig(device="cpu", threads=1, cache_bytes=0)
        )
    try:
        await load(engine, "m:1", model_dir)
        await load(engine, "m:2", other_model_dir)
        yield engine
    finally:
        await engine.kill()


async def load(engine: EngineProcess, key: str, path: Path) -> engine_pb2.LoadedModel:
    request = engine_pb2.LoadRequest(key=key, path=str(path))
    return (await engine.call(lambda stub: stub.Load, request, 60)).model


async def status(engine: EngineProcess) -> engine_pb2.StatusResponse:
    return await engine.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), 10)


def file(encoded: bytes) -> tensor_pb2.Image:
    return tensor_pb2.Image(encoded=encoded)


async def embed_images(
    engine: EngineProcess,
    items: Sequence[tensor_pb2.Image],
    model: str = "m:1",
    timeout_s: float | None = 60,
) -> inference_pb2.EmbedImagesResponse:
    request = inference_pb2.EmbedImagesRequest(model=model, images=items)
    return await engine.call(lambda stub: stub.EmbedImages, request, timeout_s)


async def embed_texts(
    engine: EngineProcess, texts: Sequence[str], model: str = "m:1"
) -> inference_pb2.EmbedTextsResponse:
    request = inference_pb2.EmbedTextsRequest(model=model, texts=texts)
    return await engine.call(lambda stub: stub.EmbedTexts, request, 60)


@torch.inference_mode()
def plain_open_clip(folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Unit vectors of FILES and TEXTS, and the logit scale, by open_clip alone."""
    import io

    from PIL import Image

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(Image.open(io.BytesIO(encoded))) for encoded in FILES])
    image_rows = model.encode_image(pixels, normalize=True).numpy()
    text_rows = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    return image_rows, text_rows, float(model.logit_scale.exp())


async def test_vectors_equal_those_of_plain_open_clip(
    engine: EngineProcess, model_dir: Path, other_model_dir: Path
) -> None:
    for model, folder in (("m:1", model_dir), ("m:2", other_model_dir)):
        image_rows, text_rows, _ = plain_open_clip(folder)
        found = await embed_images(engine, [file(encoded) for encoded in FILES], model)
        assert found.model == model
        assert not found.errors
        np.testing.assert_allclose(unpack(found.embeddings), image_rows, atol=1e-5, rtol=0)
        texts = await embed_texts(engine, TEXTS, model)
        np.testing.assert_allclose(unpack(texts.embeddings), text_rows, atol=1e-5, rtol=0)


async def test_raw_pixels_give_the_vector_of_their_file(engine: EngineProcess) -> None:
    pixels = np.asarray(images.draw("red", "circle"))
    items = [
        file(images.png("red", "circle")),
        tensor_pb2.Image(pixels=pack(pixels)),
        tensor_pb2.Image(pixels=pack(pixels.astype(np.float32) / 255)),
    ]
    rows = unpack((await embed_images(engine, items)).embeddings)
    np.testing.assert_allclose(rows[1:], rows[[0, 0]], atol=1e-6)


async def test_similarity_pairs_and_classes_follow_from_open_clips_vectors(
    engine: EngineProcess, model_dir: Path
) -> None:
    image_rows, text_rows, logit_scale = plain_open_clip(model_dir)
    items = [file(encoded) for encoded in FILES]
    similar = await engine.call(
        lambda stub: stub.Similarity,
        inference_pb2.SimilarityRequest(model="m:1", images=items, texts=TEXTS),
        60,
    )
    np.testing.assert_allclose(unpack(similar.scores), image_rows @ text_rows.T, atol=1e-5)
    assert similar.logit_scale == pytest.approx(logit_scale)

    pairs = [
        inference_pb2.ImageTextPair(image=image, text=text) for image, text in zip(items, TEXTS, strict=False)
    ]
    scored = await engine.call(
        lambda stub: stub.ScorePairs, inference_pb2.ScorePairsRequest(model="m:1", pairs=pairs), 60
    )
    expected = (image_rows * text_rows[:3]).sum(axis=1)
    np.testing.assert_allclose(unpack(scored.scores), expected, atol=1e-5)

    classes = [
        spec_pb2.ClassPrompts(label="first", prompts=TEXTS[:2]),
        spec_pb2.ClassPrompts(label="second", prompts=TEXTS[2:3]),
    ]
    request = inference_pb2.ClassifyRequest(model="m:1", images=items, classes=classes)
    mean = text_rows[:2].mean(axis=0)
    class_rows = np.stack([mean / np.linalg.norm(mean), text_rows[2]])
    logits = torch.from_numpy(logit_scale * (image_rows @ class_rows.T))
    for _ in range(2):  # the second time from the class vectors that are remembered
        answer = await engine.call(lambda stub: stub.Classify, request, 60)
        assert list(answer.labels) == ["first", "second"]
        np.testing.assert_allclose(unpack(answer.scores), image_rows @ class_rows.T, atol=1e-5)
        np.testing.assert_allclose(unpack(answer.probabilities), logits.softmax(dim=1).numpy(), atol=1e-4)


async def test_a_class_without_prompts_is_its_label_in_the_usual_sentence(engine: EngineProcess) -> None:
    async def scores(classes: Sequence[spec_pb2.ClassPrompts]) -> np.ndarray[Any, Any]:
        request = inference_pb2.ClassifyRequest(model="m:1", images=[file(FILES[0])], classes=classes)
        return unpack((await engine.call(lambda stub: stub.Classify, request, 60)).scores)

    plain = [spec_pb2.ClassPrompts(label=label) for label in ("cat {", "dog")]
    spelled = [spec_pb2.ClassPrompts(label=one.label, prompts=[f"a photo of a {one.label}"]) for one in plain]
    np.testing.assert_array_equal(await scores(plain), await scores(spelled))


async def test_classification_refuses_what_only_an_evaluation_looks_at(engine: EngineProcess) -> None:
    sick = spec_pb2.ClassPrompts(label="sick", prompts=["a shadow"], negative_prompts=["no finding"])
    request = inference_pb2.ClassifyRequest(
        model="m:1", images=[file(FILES[0])], classes=[spec_pb2.ClassPrompts(label="well"), sick]
    )
    with pytest.raises(InvalidInputError, match=r"classes\[1\] \('sick'\) has negative_prompts"):
        await engine.call(lambda stub: stub.Classify, request, 60)


async def test_classification_refuses_a_single_class_and_a_label_that_stands_twice(
    engine: EngineProcess,
) -> None:
    for labels, message in ((["cat"], "at least 2"), (["cat", "cat"], "twice"), (["cat", " "], "no label")):
        classes = [spec_pb2.ClassPrompts(label=label) for label in labels]
        request = inference_pb2.ClassifyRequest(model="m:1", images=[file(FILES[0])], classes=classes)
        with pytest.raises(InvalidInputError, match=message):
            await engine.call(lambda stub: stub.Classify, request, 60)


async def test_a_class_with_a_bad_prompt_fails_alone(engine: EngineProcess) -> None:
    classes = [
        spec_pb2.ClassPrompts(label="cat"),
        spec_pb2.ClassPrompts(label="dog", prompts=["a dog", ""]),
        spec_pb2.ClassPrompts(label="cow"),
    ]
    request = inference_pb2.ClassifyRequest(
        model="m:1", images=[file(FILES[0]), file(images.not_an_image())], classes=classes
    )
    answer = await engine.call(lambda stub: stub.Classify, request, 60)
    told = {(error.field, error.index): error.error.reason for error in answer.errors}
    assert told == {("images", 1): "ImageDecodeError", ("classes", 1): "TextError"}
    for matrix in (unpack(answer.scores), unpack(answer.probabilities)):
        np.testing.assert_array_equal(np.isnan(matrix), [[False, True, False], [True, True, True]])
    assert np.nansum(unpack(answer.probabilities)[0]) == pytest.approx(1)
    del request.classes[2]
    with pytest.raises(TextError):
        await engine.call(lambda stub: stub.Classify, request, 60)


BAD_IMAGES = [
    (file(images.truncated_jpeg()), ImageDecodeError),
    (file(images.not_an_image()), ImageDecodeError),
    (file(b""), ImageDecodeError),
    (tensor_pb2.Image(), ImageDecodeError),
    (file(images.header_only_png(60_000, 60_000)), ImageSizeError),
    (file(images.wide_png()), ImageSizeError),
    (tensor_pb2.Image(pixels=pack(np.zeros((0, 4, 3), dtype=np.uint8))), ImageSizeError),
    (tensor_pb2.Image(pixels=pack(np.full((4, 4, 3), np.nan, dtype=np.float32))), TensorError),
    (tensor_pb2.Image(pixels=pack(np.zeros((4, 4), dtype=np.uint8))), TensorError),
    (tensor_pb2.Image(pixels=tensor_pb2.Tensor(data=b"abc", dtype=3, shape=[9, 9, 3])), TensorError),
]
BAD_TEXTS = ["", " \n", "x" * 100_000]


async def test_bad_images_fail_alone_each_with_its_own_class(engine: EngineProcess) -> None:
    good = file(FILES[0])
    (expected,) = unpack((await embed_images(engine, [good])).embeddings)
    items = [item for bad, _ in BAD_IMAGES for item in (bad, good)]
    response = await embed_images(engine, items)
    told = {error.index: error.error.reason for error in response.errors}
    assert told == {2 * place: cls.__name__ for place, (_, cls) in enumerate(BAD_IMAGES)}
    assert {error.field for error in response.errors} == {"images"}
    rows = unpack(response.embeddings)
    assert np.isnan(rows[0::2]).all()
    np.testing.assert_allclose(rows[1::2], np.tile(expected, (len(BAD_IMAGES), 1)), atol=1e-6)
    for bad, cls in BAD_IMAGES:
        with pytest.raises(cls):
            await embed_images(engine, [bad])


async def test_bad_texts_fail_alone(engine: EngineProcess) -> None:
    response = await embed_texts(engine, [*BAD_TEXTS, TEXTS[0]])
    assert {error.index: error.error.reason for error in response.errors} == dict.fromkeys(
        range(3), "TextError"
    )
    assert np.isfinite(unpack(response.embeddings)[3]).all()
    for bad in BAD_TEXTS:
        with pytest.raises(TextError):
            await embed_texts(engine, [bad])


async def test_bad_halves_of_pairs_and_matrices_leave_the_others_answered(engine: EngineProcess) -> None:
    good, bad = file(FILES[0]), file(images.truncated_jpeg())
    pairs = [
        inference_pb2.ImageTextPair(image=image, text=text)
        for image, text in ((good, "fine"), (bad, "fine"), (good, ""), (bad, ""))
    ]
    scored = await engine.call(
        lambda stub: stub.ScorePairs, inference_pb2.ScorePairsRequest(model="m:1", pairs=pairs), 60
    )
    told = {error.index: error.error.reason for error in scored.errors}
    assert told == {1: "ImageDecodeError", 2: "TextError", 3: "ImageDecodeError"}
    np.testing.assert_array_equal(np.isnan(unpack(scored.scores)), [False, True, True, True])

    request = inference_pb2.SimilarityRequest(model="m:1", images=[good, bad], texts=["", "fine", "good"])
    similar = await engine.call(lambda stub: stub.Similarity, request, 60)
    nan = np.isnan(unpack(similar.scores))
    np.testing.assert_array_equal(nan, [[True, False, False], [True, True, True]])
    assert [(error.field, error.index) for error in similar.errors] == [("images", 1), ("texts", 0)]


async def test_200_concurrent_requests_good_and_bad_are_all_answered_rightly(engine: EngineProcess) -> None:
    chance = random.Random(3)
    vectors = {
        model: unpack((await embed_texts(engine, TEXTS, model)).embeddings) for model in ("m:1", "m:2")
    }
    (image_row,) = unpack((await embed_images(engine, [file(FILES[1])])).embeddings)

    async def one(number: int) -> None:
        kind = chance.choice(["text", "image", "bad text", "bad image", "mixed", "unknown"])
        model = chance.choice(["m:1", "m:2"])
        if kind == "text":
            place = number % len(TEXTS)
            (row,) = unpack((await embed_texts(engine, [TEXTS[place]], model)).embeddings)
            np.testing.assert_allclose(row, vectors[model][place], atol=1e-5)
        elif kind == "image":
            (row,) = unpack((await embed_images(engine, [file(FILES[1])])).embeddings)
            np.testing.assert_allclose(row, image_row, atol=1e-5)
        elif kind == "bad text":
            with pytest.raises(TextError):
                await embed_texts(engine, [chance.choice(BAD_TEXTS)], model)
        elif kind == "bad image":
            bad, cls = chance.choice(BAD_IMAGES)
            with pytest.raises(cls):
                await embed_images(engine, [bad], model)
        elif kind == "mixed":
            response = await embed_images(engine, [file(FILES[1]), chance.choice(BAD_IMAGES)[0]])
            assert [error.index for error in response.errors] == [1]
            np.testing.assert_allclose(unpack(response.embeddings)[0], image_row, atol=1e-5)
        else:
            with pytest.raises(ModelStateError):
                await embed_texts(engine, ["fine"], "nobody:1")

    async with asyncio.timeout(60):
        await asyncio.gather(*map(one, range(200)))
    assert sum(queue.waiting_items for queue in (await status(engine)).queues) == 0


async def test_requests_share_forwards(engine: EngineProcess) -> None:
    def texts_of(found: engine_pb2.StatusResponse) -> engine_pb2.QueueStatus:
        return next(queue for queue in found.queues if (queue.model, queue.tower) == ("m:1", "text"))

    before = texts_of(await status(engine))
    # Images keep the device busy meanwhile: how many texts share a forward is how many came during another.
    busy = embed_images(engine, [file(images.jpeg(size=32))] * 128)
    await asyncio.gather(busy, *(embed_texts(engine, [f"text {number}"]) for number in range(100)))
    after = texts_of(await status(engine))
    assert after.items - before.items == 100
    assert after.batches - before.batches < 100


async def test_a_call_without_items_has_an_empty_answer(engine: EngineProcess) -> None:
    assert unpack((await embed_images(engine, [])).embeddings).shape == (0, 32)
    assert unpack((await embed_texts(engine, [])).embeddings).shape == (0, 32)


async def test_a_request_with_too_many_items_is_refused(engine: EngineProcess) -> None:
    with pytest.raises(RequestTooLargeError) as refused:
        await embed_texts(engine, ["text"] * 4097)
    assert refused.value.metadata["limit"] == "4096"


async def test_a_caller_without_time_is_told_so_and_does_not_hold_up_others(engine: EngineProcess) -> None:
    items = [file(images.jpeg(size=256))] * 200
    with pytest.raises(DeadlineExceededError):
        await embed_images(engine, items, timeout_s=0.02)
    async with asyncio.timeout(20):
        await embed_texts(engine, ["next"])


async def test_unloading_waits_for_requests_in_flight_and_takes_no_new_ones(
    engine: EngineProcess, other_model_dir: Path
) -> None:
    await load(engine, "m:3", other_model_dir)
    order: list[str] = []

    async def request() -> None:
        response = await embed_images(engine, [file(images.jpeg(size=256))] * 300, "m:3")
        assert not response.errors
        order.append("answered")

    async def unload() -> None:
        await engine.call(lambda stub: stub.Unload, engine_pb2.UnloadRequest(key="m:3"), 60)
        order.append("unloaded")

    asking = asyncio.create_task(request())
    while not any(queue.model == "m:3" and queue.items > 2 for queue in (await status(engine)).queues):
        assert not asking.done()
    unloading = asyncio.create_task(unload())
    while any(model.key == "m:3" for model in (await status(engine)).models):
        assert not unloading.done()
    with pytest.raises(ModelStateError):
        await embed_texts(engine, ["late"], "m:3")
    await asyncio.gather(asking, unloading)
    assert order == ["answered", "unloaded"]


async def test_loading_twice_changes_nothing_and_another_folder_is_refused(
    engine: EngineProcess, model_dir: Path, other_model_dir: Path
) -> None:
    assert (await load(engine, "m:1", model_dir)).embedding_dim == 32
    with pytest.raises(ModelStateError):
        await load(engine, "m:1", other_model_dir)


async def test_a_model_that_cannot_work_is_refused_when_loaded(
    engine: EngineProcess, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFoundError):
        await load(engine, "m:4", tmp_path / "nowhere")
    clip = load_exported(model_dir)
    with torch.no_grad():
        next(clip.model.parameters()).fill_(float("nan"))
    export_model(clip, tmp_path / "nan", manifest_of(clip))
    with pytest.raises(ModelStateError, match="does not work"):
        await load(engine, "m:4", tmp_path / "nan")
    weights = tmp_path / "nan" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CliptuneError) as damaged:
        await load(engine, "m:4", tmp_path / "nan")
    assert not isinstance(damaged.value, InternalError)
    assert [model.key for model in (await status(engine)).models] == ["m:1", "m:2"]


async def test_a_text_on_which_the_tower_computes_nan_fails_alone(
    engine: EngineProcess, model_dir: Path, tmp_path: Path
) -> None:
    clip = load_exported(model_dir)
    (poison,) = clip.tokenize(["zebra"])[:, 1].tolist()
    with torch.no_grad():
        clip.model.token_embedding.weight[poison] = float("nan")
    export_model(clip, tmp_path / "poisoned", manifest_of(clip))
    await load(engine, "p:1", tmp_path / "poisoned")
    response = await embed_texts(engine, ["a horse", "a zebra", "a donkey"], "p:1")
    assert {error.index: error.error.reason for error in response.errors} == {1: "InternalError"}
    np.testing.assert_array_equal(np.isnan(unpack(response.embeddings)).all(axis=1), [False, True, False])
    with pytest.raises(InternalError):
        await embed_texts(engine, ["a zebra"], "p:1")
    await engine.call(lambda stub: stub.Unload, engine_pb2.UnloadRequest(key="p:1"), 60)


async def test_the_canary_goes_through_every_model(engine: EngineProcess) -> None:
    before = {(queue.model, queue.tower): queue.items for queue in (await status(engine)).queues}
    answer = await engine.call(lambda stub: stub.Canary, engine_pb2.CanaryRequest(), 60)
    assert 0 < answer.seconds < 60
    after = {(queue.model, queue.tower): queue.items for queue in (await status(engine)).queues}
    assert after == {place: items + 1 for place, items in before.items()}


async def test_a_request_is_one_trace_from_its_caller_to_the_forward(
    engine: EngineProcess, collector: Collector
) -> None:
    parent = trace.SpanContext(
        trace_id=0x1234567890ABCDEF1234567890ABCDEF,
        span_id=0x1234567890ABCDEF,
        is_remote=False,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    assert tracer() is not None
    with trace.use_span(trace.NonRecordingSpan(parent)):
        await embed_images(engine, [file(encoded) for encoded in FILES])
    spans = await asyncio.to_thread(
        collector.spans_until, "engine.EmbedImages", parent.trace_id.to_bytes(16, "big")
    )
    by_name = {span.name: span for span in spans}
    assert {"engine.EmbedImages", "engine.decode", "engine.queue", "engine.forward"} <= set(by_name)
    call = by_name["engine.EmbedImages"]
    assert call.parent_span_id == parent.span_id.to_bytes(8, "big")
    for name in ("engine.decode", "engine.queue", "engine.forward"):
        assert by_name[name].parent_span_id == call.span_id
    forward = by_name["engine.forward"]
    attributes = {pair.key: pair.value for pair in forward.attributes}
    assert 1 <= attributes["cliptune.batch_size"].int_value <= 3
    (batch_link,) = forward.links
    batch = next(
        span for span in collector.spans if span.name == "engine.batch" and span.span_id == batch_link.span_id
    )
    assert call.span_id in [link.span_id for link in batch.links]


async def test_a_cancelled_request_frees_its_place(engine: EngineProcess) -> None:
    asking = asyncio.create_task(embed_images(engine, [file(images.jpeg(size=256))] * 300))
    while not any(queue.waiting_items for queue in (await status(engine)).queues):
        assert not asking.done()
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(20):
        await embed_images(engine, [file(FILES[0])])


async def test_the_end_of_its_stdin_ends_an_engine(engine: EngineProcess) -> None:
    """The last test of this file."""
    assert engine._process.stdin is not None
    engine._process.stdin.close()
    assert await engine.ends_within(20)
    assert engine.verdict.result() == "ended with status 0"
