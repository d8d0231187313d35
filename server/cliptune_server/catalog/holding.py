"""What the engine holds: versions that are loaded, and those that leave when the last stream has used them.

Enters: versions to load, keys to unload, one change at a time. Leaves: the engine and the catalog in step
with each other. Called by `models`, which knows what is served.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final, Protocol

from cliptune.errors import CliptuneError, UnavailableError
from cliptune.internal.v1 import engine_pb2
from cliptune_server.catalog.loaded import LoadedModels
from cliptune_server.catalog.model_files import PublishedModel

log = logging.getLogger(__name__)

# An engine may end while it loads, through no fault of the model's; its successor is waited for.
_LOAD_TRIES: Final = 2


class Engines(Protocol):
    """What is needed of the engine supervisor."""

    async def load(self, key: str, path: Path) -> engine_pb2.LoadedModel:
        """Returns when the model has answered a canary."""

    async def unload(self, key: str) -> None:
        """Waits for the model's requests in flight."""

    async def status(self) -> engine_pb2.StatusResponse:
        """Device and loaded models."""


class Holding:
    """Loads and unloads, and keeps `catalog` to it.

    Attributes:
        device: of the engine; empty before the first load.
        retiring: hidden versions that a bulk stream still uses, each with its unloading, which waits for it.
    """

    def __init__(self, catalog: LoadedModels, engines: Engines) -> None:
        self._catalog, self._engines = catalog, engines
        self.device = ""
        self.retiring: Final[dict[str, asyncio.Task[None]]] = {}

    async def load(self, model: PublishedModel) -> None:
        """Have a version answer requests; one that does already is left alone."""
        if model.key in self._catalog:
            return
        if await self._called_back(model):
            self._catalog.add(model)
            return
        self._catalog.announce(model)
        try:
            for left in reversed(range(_LOAD_TRIES)):
                try:
                    await self._engines.load(model.key, model.path)
                    break
                except UnavailableError:
                    if not left:
                        raise
            self.device = (await self._engines.status()).device
            self._catalog.add(model)
            log.info("loaded %s", model.key)
        finally:
            self._catalog.withdraw(model.key)

    async def unload(self, key: str) -> None:
        """New requests do not find it from now on; it leaves the engine when nothing uses it."""
        # Requests that were sent to it are answered first; one that comes too late the router sends anew.
        self._catalog.hide(key)
        if self._catalog.is_held(key):
            # Not within this change: a stream may last for hours.
            self.retiring[key] = asyncio.create_task(self._retire(key), name=f"retire-{key}")
        else:
            await self._engines.unload(key)
            log.info("unloaded %s", key)

    async def _retire(self, key: str) -> None:
        log.info("%s is unloaded when the streams that use it have ended", key)
        await self._catalog.until_free(key)
        try:
            await self._engines.unload(key)
            log.info("unloaded %s", key)
        except CliptuneError as error:
            log.warning("%s could not be unloaded: %s", key, error.message)
        finally:
            self.retiring.pop(key, None)

    async def _called_back(self, model: PublishedModel) -> bool:
        """Whether a version that was to be unloaded is in the engine still, and stays now."""
        retiring = self.retiring.get(model.key)
        if retiring is None:
            return False
        if held := self._catalog.is_held(model.key):
            retiring.cancel()
        await asyncio.wait([retiring])
        self.retiring.pop(model.key, None)
        return held
