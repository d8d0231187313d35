"""Faster towers of a served model: made beside its requests, the same vectors, gone with the model."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from cliptune import Client
from cliptune_model.attention import AttentionPlan
from cliptune_model.clip import build
from cliptune_model.machine.proofs import UNKNOWN
from cliptune_model.source import ModelSource
from cliptune_server.engine.batcher import Batcher, BatcherConfig
from cliptune_server.engine.cache import EmbeddingCache
from cliptune_server.engine.decode import Decoder
from cliptune_server.engine.models import ModelSet
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.readying import Readying
from cliptune_server.engine.towers import Towers, in_few_shapes
from tests.support.daemon import running_daemon
from tests.support.models import TEST_MODEL, build_test_clip, export_test_model, publish_test_model

torch.set_num_threads(1)
MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="no MKL")  # type: ignore[no-untyped-call]


@pytest_asyncio.fixture
async def models() -> AsyncIterator[ModelSet]:
    progress = Progress()
    batcher = Batcher(progress=progress, threads=lambda: None, config=BatcherConfig())
    decoder = Decoder(threads=1, progress=progress)
    batcher.start()
    served = ModelSet(
        device="cpu",
        attention=AttentionPlan(mode="sdpa"),
        batcher=batcher,
        decoder=decoder,
        decoded_ahead=8,
        cache=EmbeddingCache(0),
        precision="exact",
        decode="exact",
        proofs=UNKNOWN,
    )
    yield served
    await batcher.close()
    decoder.close()
    served.close()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a large one: made ready beside its requests."""
    monkeypatch.setattr("cliptune_server.engine.towers._SMALL_BYTES", 0)


@MKL
async def test_a_small_model_is_frozen_before_it_serves(models: ModelSet, tmp_path: Path) -> None:
    export_test_model(tmp_path / "m")
    model = await models.load("m:1", str(tmp_path / "m"))
    assert model.describe().towers == "packed", model.describe().towers_reason


@MKL
@pytest.mark.usefixtures("large")
async def test_a_model_serves_at_once_and_then_by_frozen_weights_with_the_same_vectors(
    models: ModelSet, tmp_path: Path
) -> None:
    clip = export_test_model(tmp_path / "m")
    model = await models.load("m:1", str(tmp_path / "m"))
    assert model.describe().towers in ("eager", "packed")  # asked while it is being made
    await models.readying.settled("m:1")
    told = model.describe()
    assert told.towers == "packed", told.towers_reason
    assert "MKL" in told.towers_reason
    texts = clip.tokenize_trimmed(["a red circle", "two blue squares"])
    images = torch.randn(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for found_ND, plain_ND in (
            (model.towers.images(images), clip.encode_images(images)),
            (model.towers.texts(texts), clip.encode_texts(texts)),
        ):
            wanted_ND = torch.nn.functional.normalize(plain_ND, dim=-1).numpy()
            np.testing.assert_allclose(found_ND, wanted_ND, atol=1e-5)
    await models.ask_canary(model)
    await models.unload("m:1")


@MKL
@pytest.mark.parametrize("kind", ["small", "large"])
async def test_frozen_weights_go_with_their_model(
    models: ModelSet, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "large":
        request.getfixturevalue("large")
    export_test_model(tmp_path / "m")
    model = await models.load("m:1", str(tmp_path / "m"))
    await models.readying.settled("m:1")
    serving = weakref.ref(model.towers._serving.model)
    assert serving() is not None
    await models.unload("m:1")
    del model
    gc.collect()
    assert serving() is None


async def test_what_is_being_made_for_a_model_that_goes_is_given_up() -> None:
    readying, begun, given_up = Readying(), threading.Event(), threading.Event()

    def work(unwanted: Callable[[], bool]) -> None:
        begun.set()
        while not unwanted():
            pass
        given_up.set()

    readying.begin("m:1", work)
    await asyncio.to_thread(begun.wait, 10)
    await readying.end("m:1")
    assert given_up.is_set()
    await readying.end("m:1")  # again: nothing happens
    readying.close()


async def test_a_failure_while_making_a_faster_form_leaves_the_model_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    readying = Readying()

    def work(unwanted: Callable[[], bool]) -> None:
        raise MemoryError("no more")

    readying.begin("m:1", work)
    await readying.settled("m:1")
    assert "no faster form of model m:1" in caplog.text
    readying.close()


def test_towers_that_cannot_be_frozen_say_why_and_serve_on() -> None:
    clip = build_test_clip()
    towers = Towers(clip)
    towers.freeze(stopped=lambda: True)
    assert towers.form.value == "off"
    assert "unloaded" in towers.form.reason or "MKL" in towers.form.reason
    assert towers.texts(clip.tokenize_trimmed(["a circle"])).shape == (1, clip.embedding_dim)


def test_batches_for_apples_gpu_come_in_few_shapes_and_lose_nothing() -> None:
    seen = set()
    for count in range(1, 65):
        batch = torch.arange(count * 2).view(count, 2)
        padded = in_few_shapes(batch)
        seen.add(len(padded))
        assert torch.equal(padded[:count], batch)
        assert torch.equal(padded[count:], batch[-1:].expand(len(padded) - count, 2))
    assert seen == {1, 2, 4, 8, 16, 32, 64}


def test_a_loaded_model_tells_how_it_is_served_and_one_that_is_not_does_not(tmp_path: Path) -> None:
    publish_test_model(tmp_path, serve=True)
    publish_test_model(tmp_path, seed=1)
    with running_daemon(tmp_path, threads=1) as daemon, Client(daemon.grpc) as client:
        # Served by name: the newest version.
        by_version = {model.version: model.message for model in client.list_models()}
        served = by_version[2].served
        assert (served.precision, served.precision_cosine, served.decode) == ("fp32", 1.0, "exact")
        assert served.towers in ("eager", "packed", "off")
        assert served.towers_reason
        assert not by_version[1].HasField("served")
        assert client.get_model("shapes:2").message.HasField("served")


async def test_what_follows_the_making_goes_on_until_it_says_so_or_the_model_goes() -> None:
    readying = Readying()
    turns: list[int] = []

    async def then() -> bool:
        turns.append(len(turns))
        return len(turns) < 3

    readying.begin("m:1", lambda unwanted: None, then)
    await readying.settled("m:1")
    assert turns == [0, 1, 2]

    async def for_ever() -> bool:
        await asyncio.sleep(0)
        return True

    readying.begin("m:2", lambda unwanted: None, for_ever)
    await readying.end("m:2")
    readying.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_towers_record_graphs_that_answer_as_the_forwards_do() -> None:
    clip = build(ModelSource(name=TEST_MODEL), device="cuda")
    towers = Towers(clip, lambda: torch.autocast("cuda", torch.bfloat16), torch.bfloat16)
    rows = [torch.randn(3, *clip.image_size) for _ in range(3)]
    texts = list(clip.tokenize_trimmed(["a red circle", "two blue squares"]))
    before = towers.images(towers.stack(rows)), towers.texts(towers.stack(texts))
    towers.freeze()
    while towers.record_next():
        pass
    assert towers.form.value == "bf16, graphs", towers.form.reason
    after = towers.images(towers.stack(rows)), towers.texts(towers.stack(texts))
    for one_ND, other_ND in zip(before, after, strict=True):
        assert (one_ND * other_ND).sum(axis=1).min() > 0.9999
