"""A request's image size, through a real daemon: gRPC, REST, bulk and both clients agree."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import numpy as np
import pytest

from cliptune import AsyncClient, Client, ProvenSize
from cliptune.errors import InvalidInputError
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.proven_sizes import ProvenSize as Proven
from cliptune_server.catalog.model_files import ModelFiles
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.models import build_test_clip

IMAGES = [images.png("red"), images.jpeg("blue", "square")]
PROVEN = tuple(
    Proven(height=side, width=side, value=value, images_per_second=speed, latency_ms=1.5, memory_bytes=7)
    for side, value, speed in ((16, 0.5, 900.0), (48, 0.9, 200.0))
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("sizes") / "home"
    published(home)
    with running_daemon(home) as running, Client(running.grpc) as client:
        client.load_model("sizes")
        yield running


def published(home: Path) -> None:
    """A model that was measured at two sizes and is served at a third."""
    files, clip = ModelFiles(home / "models"), build_test_clip(1)
    files.root.mkdir(parents=True, exist_ok=True)
    export = home / "models" / ".staging" / "test-export-sizes"
    export_model(clip, export, manifest_of(clip, serving_size=(40, 40), proven_sizes=PROVEN))
    files.publish(export, name="sizes", job_id="", metrics={})


def posted(daemon: RunningDaemon, path: str, body: Mapping[str, object]) -> httpx.Response:
    return httpx.post(f"{daemon.url}{path}", json={"model": "sizes", **body}, timeout=60)


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_the_catalog_tells_the_proven_sizes_and_the_one_that_is_served(daemon: RunningDaemon) -> None:
    with Client(daemon.grpc) as client:
        model = client.get_model("sizes")
    assert model.sizes == tuple(
        ProvenSize(
            height=one.height,
            width=one.width,
            value=one.value,
            images_per_second=one.images_per_second,
            latency_ms=one.latency_ms,
            memory_bytes=one.memory_bytes,
        )
        for one in PROVEN
    )
    assert (model.image_size, model.serving_size) == (32, 40)


@pytest.mark.parametrize(("word", "side"), [("fast", 16), ("best", 48), ("", 40)])
def test_every_way_to_embed_takes_the_size(daemon: RunningDaemon, word: str, side: int) -> None:
    with Client(daemon.grpc) as client:
        expected = np.asarray(client.embed_images(IMAGES, model="sizes", resolution=side))
        found = {
            "word": client.embed_images(IMAGES, model="sizes", resolution=word),
            "pair": client.embed_images(IMAGES, model="sizes", resolution=(side, side)),
            "bulk": client.embed_many(IMAGES, model="sizes", resolution=word),
        }

    async def by_async() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        async with AsyncClient(daemon.grpc) as client:
            return np.asarray(await client.embed_many(IMAGES, model="sizes", resolution=word))

    found_by_all = {name: np.asarray(vectors) for name, vectors in found.items()}
    found_by_all["async"] = asyncio.run(by_async())
    body = {"input": [{"image": encoded(image)} for image in IMAGES], "resolution": word}
    rest = posted(daemon, "/v1/embeddings", body).raise_for_status().json()
    found_by_all["rest"] = np.array([item["embedding"] for item in rest["data"]], np.float32)
    for name, vectors in found_by_all.items():
        assert np.abs(vectors - expected).max() <= 1e-6, name


def test_similarity_pairs_and_classes_take_it_over_both_faces(daemon: RunningDaemon) -> None:
    pictures = [encoded(image) for image in IMAGES]
    texts = ["red", "blue"]
    with Client(daemon.grpc) as client:
        scores = client.similarity(IMAGES, texts, model="sizes", resolution="fast").scores
        pairs = client.score_pairs(
            list(zip(IMAGES, texts, strict=True)), model="sizes", resolution="fast"
        ).scores
        classes = client.classify(IMAGES, texts, model="sizes", resolution="fast")
        other = client.similarity(IMAGES, texts, model="sizes", resolution="best").scores
    assert np.abs(scores - other).max() > 1e-4
    assert np.abs(np.diagonal(scores) - pairs).max() <= 1e-6
    fast: dict[str, object] = {"resolution": "fast"}
    rest = posted(daemon, "/v1/similarity", {"images": pictures, "texts": texts, **fast}).json()
    assert np.abs(np.array(rest["scores"]) - scores).max() <= 1e-6
    told = posted(daemon, "/v1/classify", {"images": pictures, "classes": texts, **fast}).json()
    assert abs(max(told["probabilities"][0]) - classes[0].probability) <= 1e-6


def test_uploaded_files_take_it_too(daemon: RunningDaemon) -> None:
    files = [("images", (f"{place}.img", image)) for place, image in enumerate(IMAGES)]
    form = {"model": "sizes", "resolution": "fast"}
    with Client(daemon.grpc) as client:
        expected = np.asarray(client.embed_images(IMAGES, model="sizes", resolution=16))
        classes = client.classify(IMAGES, ["red", "blue"], model="sizes", resolution=16)
    embedded = httpx.post(f"{daemon.url}/v1/embed/images", files=files, data=form, timeout=60).json()
    found = np.array([item["embedding"] for item in embedded["data"]], np.float32)
    assert np.abs(found - expected).max() <= 1e-6
    form["classes"] = '["red", "blue"]'
    told = httpx.post(f"{daemon.url}/v1/classify", files=files, data=form, timeout=60).json()
    assert abs(max(told["probabilities"][0]) - classes[0].probability) <= 1e-6


def test_a_wrong_size_is_the_same_error_over_both_faces(daemon: RunningDaemon) -> None:
    with (
        Client(daemon.grpc) as client,
        pytest.raises(InvalidInputError, match="fast, balanced, best") as told,
    ):
        client.embed_images(IMAGES, model="sizes", resolution="huge")
    rest = posted(daemon, "/v1/embeddings", {"input": [{"image": encoded(IMAGES[0])}], "resolution": "huge"})
    assert rest.status_code == 400
    assert told.value.message in rest.text.replace('\\"', '"')


@pytest.mark.parametrize("resolution", [0, (1, 2, 3), (16, -1)])
def test_what_is_no_size_is_refused_before_it_is_sent(daemon: RunningDaemon, resolution: object) -> None:
    with Client(daemon.grpc) as client, pytest.raises(InvalidInputError, match="resolution is"):
        client.embed_images(IMAGES, model="sizes", resolution=resolution)  # type: ignore[arg-type]
