"""What becomes of a job's export: published once, served as its spec says, swapped under its aliases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cliptune.errors import ModelNotFoundError, ModelStateError, UnavailableError
from cliptune.v1 import model_pb2
from cliptune.v1.spec_pb2 import PublishSpec
from cliptune_server.catalog.model_files import ModelFiles
from cliptune_server.catalog.models import Models
from cliptune_server.catalog.registry import Registry
from cliptune_server.database import Database
from cliptune_server.inference.engine_process import EngineConfig
from cliptune_server.inference.engines import EngineSupervisor
from tests.support.models import export_test_model, publish_test_model


@pytest.fixture
async def models(tmp_path: Path) -> AsyncIterator[Models]:
    database = Database.open(tmp_path / "cliptune.db")
    engines = EngineSupervisor(EngineConfig(device="cpu", threads=1, standby=False))
    registry = Registry(ModelFiles(tmp_path / "models"), database)
    models = Models(registry=registry, engines=engines, serving_path=tmp_path / "serving.json")
    await engines.start()
    await models.start()
    yield models
    await models.stop()
    await engines.stop(5.0)
    database.close()


async def loaded(models: Models) -> list[str]:
    listed = await models.list(model_pb2.ListModelsRequest())
    return [f"{model.name}:{model.version}" for model in listed.models if model.loaded]


async def test_jobs_publish_versions_that_replace_each_other_under_their_aliases(
    models: Models, tmp_path: Path
) -> None:
    def export(seed: int) -> Path:
        export_test_model(tmp_path / f"export{seed}", seed=seed)
        return tmp_path / f"export{seed}"

    live = PublishSpec(model="shapes", aliases=["prod", "live"])
    published = await models.publish("job-1", live, export(1), {"auroc": 0.5})
    first = published.model
    assert published.not_loaded == ""
    assert (first.name, first.version, list(first.aliases)) == ("shapes", 1, ["live", "prod"])
    assert await loaded(models) == ["shapes:1"]
    assert await models.publish("job-1", live, tmp_path / "export1", {}) == published

    second = (await models.publish("job-2", live, export(2), {})).model
    assert (second.version, list(second.aliases)) == (2, ["live", "prod"])
    assert await loaded(models) == ["shapes:2"]
    assert await models.catalog.resolve("shapes@prod") == "shapes:2"

    quiet = PublishSpec(model="shapes", aliases=["candidate"], serve=False)
    third = (await models.publish("job-3", quiet, export(3), {})).model
    assert (third.version, list(third.aliases)) == (3, ["candidate"])
    assert await loaded(models) == ["shapes:2"]
    assert await models.catalog.resolve("shapes") == "shapes:2"
    source = await models.resolve_source("registry:shapes@candidate")
    assert source == f"local-dir:{tmp_path / 'models' / 'shapes' / '3'}"
    assert await models.resolve_source("ViT-B-32") == "ViT-B-32"
    with pytest.raises(ModelNotFoundError):
        await models.resolve_source("registry:shapes@nothing")

    # Weights that no engine can load: kept as a version, but what is served stays served.
    broken = export(4)
    (broken / "open_clip_model.safetensors").write_bytes(b"not weights")
    published = await models.publish("job-4", live, broken, {})
    fourth = published.model
    assert (fourth.version, list(fourth.aliases)) == (4, [])
    assert await loaded(models) == ["shapes:2"]
    assert await models.catalog.resolve("shapes@prod") == "shapes:2"
    assert "shapes:4 is published, and not loaded for inference" in published.not_loaded
    assert "what is served stays as it was (shapes@live, shapes@prod)" in published.not_loaded
    # A version that is not to be served and touches no served alias is not tried at all.
    aside = PublishSpec(model="shapes", aliases=["aside"], serve=False)
    worse = export(5)
    (worse / "open_clip_model.safetensors").write_bytes(b"not weights")
    assert (await models.publish("job-5", aside, worse, {})).not_loaded == ""


async def test_what_is_being_loaded_again_after_a_start_is_worth_asking_for_again(tmp_path: Path) -> None:
    publish_test_model(tmp_path, "shapes", seed=1, aliases=["prod"], serve=True)
    publish_test_model(tmp_path, "shapes", seed=2)
    database = Database.open(tmp_path / "cliptune.db")
    models = Models(
        registry=Registry(ModelFiles(tmp_path / "models"), database),
        engines=EngineSupervisor(EngineConfig(device="cpu", start_timeout_s=0.2)),  # never started
        serving_path=tmp_path / "serving.json",
    )
    await models.start()
    for reference in ("shapes@prod", "shapes:1", "shapes", ""):
        with pytest.raises(UnavailableError, match="is being loaded") as refused:
            await models.catalog.resolve(reference)
        assert float(refused.value.metadata["retry_after_s"]) > 0
    with pytest.raises(ModelStateError, match="cliptune models load shapes:2"):
        await models.catalog.resolve("shapes:2")
    await models.restore()  # in vain: now it is known that asking again does not help
    for reference in ("shapes@prod", "shapes"):
        with pytest.raises(ModelStateError, match="published but not loaded"):
            await models.catalog.resolve(reference)
    await models.stop()
    database.close()
