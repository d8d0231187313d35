"""Models as users handle them: published, listed, loaded, named by aliases, swapped while requests run.

Enters: finished jobs (`publish`), ModelService's messages, and the references of inference requests
(`catalog`). Leaves: published versions, and the engine holding exactly those that are served. What is served
is remembered as references in serving.json ("shapes@prod"), not as versions: a daemon that starts again
serves what the alias points at then.

Served is what a reference was loaded for. A version is unloaded when no served reference means it any more:

    load("shapes@prod"), then set_alias("shapes:2", "prod")   2 is loaded, prod moves, 1 is unloaded
    load("shapes:1"), then the same                           1 stays beside 2: asked for by number

A daemon that serves nothing serves its default model, until something else is served or it is unloaded.

Changes run one at a time and to their end, also when the caller goes away. Called by `rpc/models.py`, the
gateway, jobs and the router; the daemon makes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from cliptune.errors import CliptuneError, InvalidInputError, ModelStateError
from cliptune.v1 import job_pb2, model_pb2, spec_pb2
from cliptune_server.catalog.changes import Changes
from cliptune_server.catalog.default_model import take_in
from cliptune_server.catalog.description import look, message_of
from cliptune_server.catalog.holding import Engines, Holding
from cliptune_server.catalog.loaded import LoadedModels
from cliptune_server.catalog.model_files import PublishedModel, check_name
from cliptune_server.catalog.registry import Reference, Registry
from cliptune_server.catalog.serving import not_loaded, read_serving
from cliptune_server.catalog.traffic import Traffic
from cliptune_server.home import write_json
from cliptune_server.training.publisher import Publication

log = logging.getLogger(__name__)

REGISTRY_SOURCE: Final = "registry:"

Result = TypeVar("Result")


class Models:
    """Publisher and ModelService's operations; `catalog` answers the router."""

    def __init__(
        self, *, registry: Registry, engines: Engines, serving_path: Path, default_model: str = ""
    ) -> None:
        """`default_model`: name of an embedded model that is served while nothing else is; empty: none."""
        self.catalog: Final = LoadedModels(registry)
        self._registry = registry
        self._engines = engines
        self._holding = Holding(self.catalog, engines)
        self._serving_path = serving_path
        self._default_model = default_model
        self._default: PublishedModel | None = None
        self._served: set[Reference] = set()
        self._before: dict[str, PublishedModel] = {}
        """References of the last daemon, with the versions that they mean now, until `restore`."""
        self._changing = Changes()

    async def start(self) -> None:
        """Rebuild the index. Loading what was served before is `restore`, which takes longer."""
        await self._registry.start()
        self.catalog.set_aliases(await self._registry.aliases())
        self.catalog.traffic = await self._registry.traffic()
        for text in await asyncio.to_thread(read_serving, self._serving_path):
            try:
                self._before[text] = await self._registry.find(Reference.parse(text))
            except CliptuneError as error:
                log.warning("%s was served before and is not there now: %s", text, error.message)
        if not self._before and self._default_model:
            self._default = await take_in(self._registry, self._default_model)
        for model in (*self._before.values(), *([self._default] if self._default else [])):
            self.catalog.announce(model)

    async def restore(self) -> None:
        """Load what was served when the daemon stopped, or the default model when that was nothing.

        The default is no served reference: it gives way as soon as there is one.
        One that cannot be loaded gets a log line: it must not keep the others from being served.
        """
        async with self._changing.alone:
            for text, model in self._before.items():
                try:
                    self._served.add(reference := Reference.parse(text))
                    await self._holding.load(model)
                    await self._load_beside(reference)
                except CliptuneError as error:
                    log.warning("%s was served before and cannot be loaded now: %s", text, error.message)
            if self._default and not self._served:
                try:
                    await self._holding.load(self._default)
                except CliptuneError as error:
                    log.warning("%s is not served by default: %s", self._default.key, error.message)

    async def stop(self) -> None:
        """Give up the changes that are under way."""
        work = [*self._changing.tasks, *self._holding.retiring.values()]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    # --- Publisher

    async def publish(
        self, job_id: str, publish: spec_pb2.PublishSpec, export_dir: Path, metrics: Mapping[str, float]
    ) -> Publication:
        """Take a job's export into the registry, set its aliases and serve it as its spec says.

        The same job publishes once, however often this is called. A model that the engine cannot load now is
        published all the same, and the answer says so; an alias that is served then stays where it was.
        """
        for alias in publish.aliases:
            check_name(alias, "alias")
        return await self._change(self._publish(job_id, publish, export_dir, metrics))

    async def resolve_source(self, name: str) -> str:
        """ "registry:NAME@prod" → "local-dir:/…/models/NAME/3"; any other source as it is."""
        if not name.startswith(REGISTRY_SOURCE):
            return name
        model = await self._registry.find(Reference.parse(name.removeprefix(REGISTRY_SOURCE)))
        return f"local-dir:{model.path}"

    # --- ModelService

    async def list(self, request: model_pb2.ListModelsRequest) -> model_pb2.ListModelsResponse:
        """All versions, by name, newest first."""
        if request.name:
            check_name(request.name)
        models = await self._registry.models(request.name)
        await look(self.catalog, self._engines)
        return model_pb2.ListModelsResponse(models=[self._message(model) for model in models])

    async def get(self, reference: str) -> model_pb2.Model:
        """One version. `ModelNotFoundError`."""
        model = await self._registry.find(Reference.parse(reference))
        await look(self.catalog, self._engines)
        return self._message(model)

    async def load(self, reference: str) -> model_pb2.Model:
        """Serve a reference; a version that is loaded already is not loaded again."""
        wanted = Reference.parse(reference)

        async def change() -> PublishedModel:
            model = await self._registry.find(wanted)
            await self._holding.load(model)
            await self._load_beside(wanted)
            await self._serve(wanted)
            return model

        return self._message(await self._change(change()))

    async def unload(self, reference: str) -> model_pb2.Model:
        """Stop serving a version, whatever it was loaded as; returns when nothing uses it any more.

        New requests do not find it from now on; bulk streams that began with it are answered to their end.
        `ModelStateError` when it is not loaded.
        """
        wanted = Reference.parse(reference)

        async def change() -> PublishedModel:
            model = self.catalog.find(wanted)
            if model is None:
                published = await self._registry.find(wanted)
                raise ModelStateError(f"{published.key} is not loaded", model=published.key)
            self._served = {served for served in self._served if self.catalog.find(served) != model}
            await self._holding.unload(model.key)
            await self._remember()
            return model

        model = await self._change(change())
        if retiring := self._holding.retiring.get(model.key):
            await asyncio.wait([retiring])
        return self._message(model)

    async def set_alias(self, reference: str, alias: str) -> model_pb2.Model:
        """Point NAME@ALIAS at a version. If the alias is served, the version is loaded before it moves."""
        wanted = Reference.parse(reference)
        named = Reference(name=wanted.name, alias=check_name(alias, "alias"))

        async def change() -> PublishedModel:
            model = await self._registry.find(wanted)
            served = named in self._served or self.catalog.find(named) is not None
            if served:
                await self._holding.load(model)
            await self._point(model, alias)
            if served:
                await self._serve(named)
            return model

        return self._message(await self._change(change()))

    async def set_traffic(self, reference: str, traffic: Traffic) -> model_pb2.Model:
        """Share the requests for NAME@ALIAS among versions, and copy them to one; an empty one ends both.

        Where the alias is served, the versions are loaded before the first request goes to them.
        """
        named = Reference.parse(reference)
        if not named.alias:
            raise InvalidInputError(f"{reference!r} is no alias: NAME@ALIAS", model=reference)

        async def change() -> PublishedModel:
            model = await self._registry.find(named)
            others = [Reference(name=named.name, version=version) for version in traffic.versions]
            beside = [await self._registry.find(other) for other in others]
            if named in self._served or self.catalog.find(named) is not None:
                for other in beside:
                    await self._holding.load(other)
                await self._route(named, traffic)
                await self._serve(named)
            else:
                await self._route(named, traffic)
            return model

        return self._message(await self._change(change()))

    async def delete_alias(self, name: str, alias: str) -> None:
        """Forget NAME@ALIAS; a version that was loaded as this alias alone is unloaded."""
        named = Reference(name=check_name(name), alias=check_name(alias, "alias"))

        async def change() -> None:
            await self._registry.delete_alias(name, alias)
            await self._route(named, Traffic())
            self.catalog.set_aliases(await self._registry.aliases())
            self._served.discard(named)
            await self._settle()

        await self._change(change())

    async def delete(self, reference: str) -> None:
        """Remove "NAME:VERSION" for good. `ModelStateError` while it is loaded or an alias points at it."""
        wanted = Reference.parse(reference)
        if wanted.version is None:
            raise InvalidInputError(
                f"{reference!r} does not say which version to delete: NAME:VERSION", model=reference
            )

        async def change() -> None:
            model = await self._registry.find(wanted)
            if model.key in self.catalog:
                raise ModelStateError(
                    f"{model.key} cannot be deleted: it is loaded, unload it first", model=model.key
                )
            if model.key in self._holding.retiring:
                raise ModelStateError(
                    f"{model.key} cannot be deleted: it is being unloaded, and a bulk stream still uses it",
                    model=model.key,
                )
            for alias in self.catalog.aliases_with(model):
                raise ModelStateError(
                    f"{model.key} cannot be deleted: it has a part in the requests for {alias}",
                    model=model.key,
                )
            await self._registry.delete(model)

        await self._change(change())

    # --- Inside a change

    async def _publish(
        self, job_id: str, publish: spec_pb2.PublishSpec, export_dir: Path, metrics: Mapping[str, float]
    ) -> Publication:
        model = await self._registry.publish(export_dir, name=publish.model, job_id=job_id, metrics=metrics)
        names = [Reference(name=model.name, alias=alias) for alias in dict.fromkeys(publish.aliases)]
        serve = publish.serve or not publish.HasField("serve")
        swapped = {name for name in names if name in self._served or self.catalog.find(name)}
        told = ""
        if serve or swapped:
            try:
                await self._holding.load(model)
            except CliptuneError as error:
                told = not_loaded(model, error, swapped)
                log.warning("%s", told)
                names = [name for name in names if name not in swapped]
                swapped.clear()
        for name in names:
            await self._point(model, name.alias)
        if serve:
            swapped.update(names or [Reference(name=model.name)])
        await self._serve(*swapped)
        aliases = self.catalog.aliases(model.name, model.version)
        published = job_pb2.ModelPublished(name=model.name, version=model.version, aliases=aliases)
        return Publication(model=published, not_loaded=told)

    async def _point(self, model: PublishedModel, alias: str) -> None:
        await self._route(Reference(name=model.name, alias=alias), Traffic())
        await self._registry.set_alias(model.name, alias, model.version)
        self.catalog.set_aliases(await self._registry.aliases())
        log.info("%s@%s is now %s", model.name, alias, model.key)

    async def _route(self, named: Reference, traffic: Traffic) -> None:
        self.catalog.traffic = await self._registry.set_traffic(named, traffic)

    async def _load_beside(self, served: Reference) -> None:
        """The other versions that answer for a reference; one that cannot be loaded has no part in it."""
        for version in sorted(self.catalog.traffic_of(served).versions):
            try:
                await self._holding.load(
                    await self._registry.find(Reference(name=served.name, version=version))
                )
            except CliptuneError as error:
                log.warning("%s has no part in the requests for %s: %s", version, served, error.message)

    async def _serve(self, *references: Reference) -> None:
        self._served.update(references)
        await self._settle()

    async def _settle(self) -> None:
        """Unload what no served reference means any more, and remember what is served."""
        meant = {key for served in self._served for key in self.catalog.meant_by(served)}
        for model in self.catalog:
            if model.key not in meant:
                await self._holding.unload(model.key)
        await self._remember()

    async def _remember(self) -> None:
        content = {"references": sorted(map(str, self._served))}
        await asyncio.to_thread(write_json, self._serving_path, content)

    async def _change(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await self._changing.run(work)

    def _message(self, model: PublishedModel) -> model_pb2.Model:
        return message_of(model, self.catalog, self._holding.device)
