"""Adapters served by a real engine process: many over one base, none over another."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from torch.nn import functional as F

from cliptune.errors import AdapterBaseError, ModelDamagedError, ModelNotFoundError
from cliptune.internal.v1 import engine_pb2
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2
from cliptune_model.adapters import AdapterConfig, load_adapted
from cliptune_model.clip import build
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_model.source import ModelSource
from cliptune_server.inference.engine_process import EngineConfig, EngineProcess
from tests.support.adapters import adapted, identity

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = ["a red circle", "a blue square", "crack"]
SEEDS = {"one": 1, "two": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and two adapters that were trained over it."""
    root = tmp_path_factory.mktemp("adapters")
    clip = build(ModelSource(name="cliptune-test-vit"), seed=4)
    export_model(clip, root / "base", manifest_of(clip))
    source = ModelSource(name=f"local-dir:{root / 'base'}")
    for name, seed in SEEDS.items():
        base = load_exported(root / "base")
        carries = adapted(base, AdapterConfig(rank=2 + seed, dropout=0.0), seed, identity(base, source))
        export_model(carries, root / name, manifest_of(carries), adapter_alone=True)
    return {name: root / name for name in ("base", *SEEDS)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineProcess]:
    config = EngineConfig(device="cpu", threads=1, cache_bytes=1 << 20)
    engine = await EngineProcess.launch(tmp_path_factory.mktemp("e") / "e.sock", config)
    try:
        yield engine
    finally:
        await engine.kill()


async def load(engine: EngineProcess, key: str, path: Path) -> None:
    await engine.call(lambda stub: stub.Load, engine_pb2.LoadRequest(key=key, path=str(path)), 60)


async def embedded(engine: EngineProcess, key: str) -> np.ndarray[Any, Any]:
    request = inference_pb2.EmbedTextsRequest(model=key, texts=TEXTS)
    return unpack((await engine.call(lambda stub: stub.EmbedTexts, request, 60)).embeddings)


@torch.inference_mode()
def expected(folder: Path, *, adapter: bool) -> np.ndarray[Any, Any]:
    clip = load_adapted(folder) if adapter else load_exported(folder)
    return F.normalize(clip.encode_texts(clip.tokenize(TEXTS)), dim=-1).numpy()


async def test_each_request_is_answered_by_the_adapter_that_it_names(
    engine: EngineProcess, folders: dict[str, Path]
) -> None:
    for name, folder in folders.items():
        await load(engine, f"{name}:1", folder)
    order = [*folders] * 3
    answers = await asyncio.gather(*(embedded(engine, f"{name}:1") for name in order))
    for name, answer in zip(order, answers, strict=True):
        np.testing.assert_allclose(answer, expected(folders[name], adapter=name in SEEDS), atol=1e-5)
    assert not np.allclose(answers[0], answers[1], atol=1e-3)
    assert not np.allclose(answers[1], answers[2], atol=1e-3)


async def test_an_adapter_stays_when_its_base_is_unloaded_and_comes_without_it(
    engine: EngineProcess, folders: dict[str, Path]
) -> None:
    await engine.call(lambda stub: stub.Unload, engine_pb2.UnloadRequest(key="base:1"), 60)
    await engine.call(lambda stub: stub.Unload, engine_pb2.UnloadRequest(key="two:1"), 60)
    await load(engine, "two:2", folders["two"])  # over the weights that the other adapter holds
    for key, name in (("one:1", "one"), ("two:2", "two")):
        np.testing.assert_allclose(
            await embedded(engine, key), expected(folders[name], adapter=True), atol=1e-5
        )


async def test_an_adapter_of_another_base_is_refused_with_both_named_and_nothing_is_served(
    engine: EngineProcess, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = build(ModelSource(name="cliptune-test-vit"), seed=9)
    export_model(other, tmp_path / "other", manifest_of(other))
    wrong, lost, cut = (tmp_path / name for name in ("wrong", "lost", "cut"))
    for folder in (wrong, lost, cut):
        shutil.copytree(folders["one"], folder)
    described = (wrong / "cliptune_adapter.json").read_text()
    digest = described.partition('"sha256": "')[2][:64]
    changed = described.replace(str(folders["base"]), str(tmp_path / "other"))
    # Known to the engine by its digest, the base would be found in memory.
    (wrong / "cliptune_adapter.json").write_text(changed.replace(digest, "0" * 64))
    with pytest.raises(AdapterBaseError, match=r"belongs to .* not to .*other") as raised:
        await load(engine, "wrong:1", wrong)
    assert raised.value.metadata["wanted"] == "0" * 64
    gone = described.replace(str(folders["base"]), str(tmp_path / "gone")).replace(digest, "1" * 64)
    (lost / "cliptune_adapter.json").write_text(gone)
    with pytest.raises(ModelNotFoundError, match=r"base of the adapter .* is not there any more"):
        await load(engine, "lost:1", lost)
    (cut / "cliptune_adapter.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelDamagedError, match="is not the file"):
        await load(engine, "cut:1", cut)
    status = await engine.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), 10)
    assert {model.key for model in status.models} == {"one:1", "two:2"}
