"""Requests for a model that is being loaded, with the catalog's own bookkeeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cliptune.errors import ModelStateError, UnavailableError
from cliptune_server.catalog.loaded import LoadedModels
from cliptune_server.catalog.model_files import ModelFiles, PublishedModel
from cliptune_server.catalog.registry import Registry
from cliptune_server.database import Database
from cliptune_server.inference.waiting import Waiting
from tests.support.models import publish_test_model


class Watched(LoadedModels):
    """Says when somebody has begun to wait."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self.asked = asyncio.Event()

    async def changed(self) -> None:
        self.asked.set()
        await super().changed()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PublishedModel]:
    home = tmp_path_factory.mktemp("home")
    return home, publish_test_model(home, "shapes", seed=1)


@pytest.fixture
async def catalog(published: tuple[Path, PublishedModel]) -> AsyncIterator[Watched]:
    home, model = published
    database = Database.open(home / "cliptune.db")
    registry = Registry(ModelFiles(home / "models"), database)
    await registry.start()
    catalog = Watched(registry)
    catalog.announce(model)
    yield catalog
    database.close()


async def test_a_request_is_answered_as_soon_as_its_model_is_loaded(
    catalog: Watched, published: tuple[Path, PublishedModel]
) -> None:
    waiting = Waiting(catalog)
    async with asyncio.timeout(30):
        for reference in ("shapes:1", ""):
            catalog.asked.clear()
            asking = asyncio.create_task(waiting.resolve(catalog, reference, None))
            await catalog.asked.wait()
            catalog.add(published[1])
            assert await asking == "shapes:1"
            catalog.hide("shapes:1")


async def test_a_request_learns_that_its_model_could_not_be_loaded(catalog: Watched) -> None:
    asking = asyncio.create_task(Waiting(catalog).resolve(catalog, "shapes:1", None))
    async with asyncio.timeout(30):
        await catalog.asked.wait()
        catalog.withdraw("shapes:1")
        with pytest.raises(ModelStateError, match="published but not loaded"):
            await asking


async def test_nobody_waits_longer_than_its_own_time_or_the_daemons_patience(catalog: Watched) -> None:
    began_s = time.monotonic()
    for waiting, deadline_s in (
        (Waiting(catalog), began_s),
        (Waiting(catalog, patience_s=0.01), None),
        (Waiting(catalog, patience_s=0.01), began_s + 3600),
    ):
        with pytest.raises(UnavailableError, match="is being loaded") as refused:
            await waiting.resolve(catalog, "shapes:1", deadline_s)
        assert float(refused.value.metadata["retry_after_s"]) > 0


async def test_more_than_there_is_room_for_are_told_at_once_to_ask_again(
    catalog: Watched, published: tuple[Path, PublishedModel]
) -> None:
    waiting = Waiting(catalog, room=1)
    first = asyncio.create_task(waiting.resolve(catalog, "shapes:1", None))
    async with asyncio.timeout(30):
        await catalog.asked.wait()
        with pytest.raises(UnavailableError, match="is being loaded"):
            await waiting.resolve(catalog, "shapes:1", None)
        catalog.add(published[1])
        assert await first == "shapes:1"
