"""The models that the engine holds, and which of them a reference means.

Enters: a reference of a request ("", "NAME", "NAME:VERSION", "NAME@ALIAS"). Leaves: the key of a loaded
version. Everything is in memory and on the event loop, so that finding a model costs a request nothing, and
a version that is hidden before it is unloaded gets no new requests; a bulk stream that began with it holds it
until its end. Changed by `models.py`; asked by
`inference/router.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from cliptune.errors import InvalidInputError, ModelStateError, UnavailableError
from cliptune.v1 import model_pb2
from cliptune_server.catalog.model_files import PublishedModel
from cliptune_server.catalog.registry import Reference, Registry
from cliptune_server.catalog.traffic import Rules, Traffic


class LoadedModels:
    """Implements the router's `Catalog`."""

    def __init__(self, registry: Registry, place: Callable[[], float] = random.random) -> None:
        """`place`: a number in [0, 1) for each request that is shared, which chooses its version."""
        self._registry = registry
        self._models: dict[str, PublishedModel] = {}
        self._coming: dict[str, PublishedModel] = {}
        self._holds: Counter[str] = Counter()
        self._let_go = asyncio.Event()
        self._settled = asyncio.Event()
        self._aliases: dict[str, dict[str, int]] = {}
        self.traffic: Rules = {}
        """How the requests for aliases are shared among versions."""
        self._place = place
        self.ways: dict[str, model_pb2.ServedWay] = {}
        """How the engine serves its models, by key, when it was last asked."""

    def __contains__(self, key: str) -> bool:
        return key in self._models

    def __iter__(self) -> Iterator[PublishedModel]:
        return iter(list(self._models.values()))

    def find(self, reference: Reference) -> PublishedModel | None:
        """The loaded version that a reference means; a bare name means the newest of the loaded ones."""
        version = reference.version
        if reference.alias:
            version = self._aliases.get(reference.name, {}).get(reference.alias, 0)
        if version is not None:
            return self._models.get(f"{reference.name}:{version}")
        versions = [model for model in self._models.values() if model.name == reference.name]
        return max(versions, key=lambda model: model.version, default=None)

    async def resolve(self, reference: str) -> str:
        """Key of the loaded version that a request's `model` means.

        `ModelNotFoundError`: nothing of this name is published. `ModelStateError`: it is, but not loaded, or
        the reference is empty and nothing is. `UnavailableError`: it is being loaded, worth asking again.
        `InvalidInputError`: the reference is empty and several are loaded.
        """
        if not reference:
            return self._only().key
        parsed = Reference.parse(reference)
        model = self._shared(parsed) or self.find(parsed)
        if model is None:
            published = await self._registry.find(parsed)
            # A load may have ended, or an alias moved, while the registry was asked.
            model = self.find(parsed)
            if model is None:
                if self._is_coming(parsed, published):
                    raise _being_loaded(reference)
                raise ModelStateError(
                    f"{reference} is published but not loaded: load it with ModelService.LoadModel, "
                    f"POST /v1/models/{published.key}/load or `cliptune models load {reference}`",
                    model=published.key,
                )
        return model.key

    def shadow(self, reference: str) -> str | None:
        """Key of the loaded version that gets a copy of a request, if one does."""
        if "@" not in reference:
            return None
        parsed = Reference.parse(reference)
        version = self.traffic_of(parsed).shadow
        key = f"{parsed.name}:{version}"
        return key if version and key in self._models else None

    def traffic_of(self, reference: Reference) -> Traffic:
        """How the requests for a reference are shared."""
        return self.traffic.get((reference.name, reference.alias), Traffic())

    def aliases_with(self, model: PublishedModel) -> list[str]:
        """Aliases whose requests a version answers in part, or gets copies of."""
        return [
            f"{name}@{alias}"
            for (name, alias), traffic in self.traffic.items()
            if name == model.name and model.version in traffic.versions
        ]

    def meant_by(self, reference: Reference) -> set[str]:
        """Keys of the loaded versions that a served reference needs."""
        model = self.find(reference)
        beside = {f"{reference.name}:{version}" for version in self.traffic_of(reference).versions}
        return {key for key in beside if key in self._models} | ({model.key} if model else set())

    def _shared(self, reference: Reference) -> PublishedModel | None:
        """The version whose turn it is, where requests are shared and it is loaded."""
        traffic = self.traffic_of(reference)
        own = self.find(reference)
        if not traffic.shares or own is None:
            return None
        return self._models.get(f"{reference.name}:{traffic.choose(self._place(), own.version)}")

    def announce(self, model: PublishedModel) -> None:
        """This version is being loaded, or will be as soon as there is an engine."""
        self._coming[model.key] = model

    def withdraw(self, key: str) -> None:
        """It is not being loaded any more: it is there, or it cannot be loaded."""
        self._coming.pop(key, None)
        self._tell()

    def add(self, model: PublishedModel) -> None:
        """The engine holds this version and it answered a canary."""
        self._models[model.key] = model
        self._tell()

    async def changed(self) -> None:
        """Returns when a model has been loaded, or will not be after all."""
        await self._settled.wait()

    def hide(self, key: str) -> None:
        """Requests from now on do not find this version."""
        self._models.pop(key, None)

    def hold(self, key: str) -> None:
        """A stream goes on with this version to its end, hidden or not."""
        self._holds[key] += 1

    def release(self, key: str) -> None:
        """The end of one `hold`."""
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]
            self._let_go.set()
            self._let_go = asyncio.Event()

    def is_held(self, key: str) -> bool:
        """Whether a stream uses this version."""
        return key in self._holds

    async def until_free(self, key: str) -> None:
        """Returns when no stream uses this version."""
        while key in self._holds:
            await self._let_go.wait()

    def set_aliases(self, aliases: Mapping[str, Mapping[str, int]]) -> None:
        """Replace all aliases: requests that come later follow the new ones."""
        self._aliases = {name: dict(versions) for name, versions in aliases.items()}

    def aliases(self, name: str, version: int) -> list[str]:
        """Aliases that point at a version."""
        return sorted(alias for alias, at in self._aliases.get(name, {}).items() if at == version)

    def _tell(self) -> None:
        self._settled.set()
        self._settled = asyncio.Event()

    def _is_coming(self, reference: Reference, newest: PublishedModel) -> bool:
        if reference.version is not None or reference.alias:
            return newest.key in self._coming
        return any(model.name == reference.name for model in self._coming.values())

    def _only(self) -> PublishedModel:
        if not self._models:
            if self._coming:
                raise _being_loaded(", ".join(sorted(self._coming)))
            raise ModelStateError(
                "no model is loaded: load one with `cliptune models load NAME`, or publish one from a job"
            )
        if len(self._models) > 1:
            keys = ", ".join(sorted(self._models))
            raise InvalidInputError(
                f"several models are loaded, so the request must name one of {keys}", allowed=keys
            )
        return next(iter(self._models.values()))


def _being_loaded(what: str) -> UnavailableError:
    return UnavailableError(f"{what} is being loaded", model=what, retry_after_s=1)
