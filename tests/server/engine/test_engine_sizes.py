"""One loaded model at many image sizes: by pixels and by word, each in batches of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from cliptune.errors import InvalidInputError
from cliptune.internal.v1 import engine_pb2
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, spec_pb2, tensor_pb2
from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.pixels import decode_image
from cliptune_model.proven_sizes import ProvenSize
from cliptune_server.inference.engine_process import EngineConfig, EngineProcess
from tests.support import images
from tests.support.models import build_test_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILES = [images.png("red", "circle"), images.jpeg("blue", "square", size=97), images.png("green", "triangle")]
PROVEN = tuple(
    ProvenSize(height=side, width=side, value=value, images_per_second=speed, latency_ms=1.0, memory_bytes=1)
    for side, value, speed in ((16, 0.70, 900.0), (32, 0.90, 400.0), (48, 0.91, 200.0))
)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build_test_clip(4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> AsyncIterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("model") / "export"
    export_model(clip, folder, manifest_of(clip, serving_size=(40, 40), proven_sizes=PROVEN))
    engine = await EngineProcess.launch(
        tmp_path_factory.mktemp("e") / "e.sock", EngineConfig(device="cpu", threads=1)
    )
    try:
        request = engine_pb2.LoadRequest(key="m:1", path=str(folder))
        loaded = (await engine.call(lambda stub: stub.Load, request, 60)).model
        assert loaded.image_size == 40
        yield engine
    finally:
        await engine.kill()


async def embedded(engine: EngineProcess, resolution: str, files: list[bytes] | None = None) -> Any:
    request = inference_pb2.EmbedImagesRequest(
        model="m:1",
        images=[tensor_pb2.Image(encoded=file) for file in files or FILES],
        resolution=resolution,
    )
    answer = await engine.call(lambda stub: stub.EmbedImages, request, 30)
    assert not answer.errors
    return unpack(answer.embeddings)


def expected(clip: Clip, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    at_size = clip.at(size)
    pixels = torch.stack([at_size.preprocess(decode_image(file)) for file in FILES])
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(clip.encode_images(pixels), dim=-1)
    return vectors.numpy()


@pytest.mark.parametrize(
    ("resolution", "size"),
    [
        ("", (40, 40)),
        ("32", (32, 32)),
        ("50", (48, 48)),
        ("24x64", (24, 64)),
        ("fast", (16, 16)),
        ("balanced", (32, 32)),
        ("best", (48, 48)),
    ],
)
async def test_images_are_embedded_at_the_size_that_is_asked_for(
    engine: EngineProcess, clip: Clip, resolution: str, size: tuple[int, int]
) -> None:
    for _ in range(2):  # the second time they are remembered, by size
        found = await embedded(engine, resolution)
        assert np.abs(found - expected(clip, size)).max() <= 1e-5


async def test_requests_of_many_sizes_at_once_are_each_answered_at_theirs(
    engine: EngineProcess, clip: Clip
) -> None:
    sides = [16, 24, 32, 40, 48, 56] * 4
    found = await asyncio.gather(*(embedded(engine, str(side)) for side in sides))
    for side, vectors in zip(sides, found, strict=True):
        assert np.abs(vectors - expected(clip, (side, side))).max() <= 1e-5


@pytest.mark.parametrize(
    ("resolution", "told"), [("huge", "fast, balanced, best"), ("4", "at least 8"), ("2000", "at most 96")]
)
async def test_a_size_that_cannot_be_served_is_refused_with_what_can(
    engine: EngineProcess, resolution: str, told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told) as error:
        await embedded(engine, resolution)
    assert error.value.metadata["path"] == "resolution"


async def test_classes_and_pairs_take_a_size_too(engine: EngineProcess) -> None:
    image = tensor_pb2.Image(encoded=FILES[0])
    classes = [spec_pb2.ClassPrompts(label=label) for label in ("circle", "square")]
    scores = []
    for resolution in ("16", "48"):
        classified = await engine.call(
            lambda stub: stub.Classify,
            inference_pb2.ClassifyRequest(
                model="m:1", images=[image], classes=classes, resolution=resolution
            ),
            30,
        )
        pair = inference_pb2.ImageTextPair(image=image, text="a photo of a circle")
        paired = await engine.call(
            lambda stub: stub.ScorePairs,
            inference_pb2.ScorePairsRequest(model="m:1", pairs=[pair], resolution=resolution),
            30,
        )
        scores.append(float(unpack(paired.scores)[0]))
        assert abs(float(unpack(classified.scores)[0, 0]) - scores[-1]) <= 1e-6
    assert scores[0] != scores[1]
