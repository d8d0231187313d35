"""Published models, asynchronously: listed, loaded, named. Part of `AsyncClient`."""

from __future__ import annotations

from collections.abc import Mapping

import cliptune.codec as codec
from cliptune.aio.connection import AsyncConnection
from cliptune.model import Model


class AsyncModelCalls(AsyncConnection):
    """ModelService."""

    async def list_models(self, name: str = "", *, timeout_s: float | None = None) -> list[Model]:
        """Every published version, or those of one name."""
        return await self._run(codec.list_models(name), timeout_s)

    async def get_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """The version that "NAME", "NAME:VERSION" or "NAME@ALIAS" means."""
        return await self._run(codec.get_model(model), timeout_s)

    async def load_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Load for inference; returns when it has answered a canary."""
        return await self._run(codec.load_model(model), timeout_s)

    async def unload_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Stop serving it; requests in flight and bulk streams that use it are answered first."""
        return await self._run(codec.unload_model(model), timeout_s)

    async def set_alias(self, model: str, alias: str, *, timeout_s: float | None = None) -> Model:
        """Point NAME@ALIAS at a version; where the alias is served, no request fails meanwhile."""
        return await self._run(codec.set_alias(model, alias), timeout_s)

    async def set_traffic(
        self,
        model: str,
        shares: Mapping[int, float] | None = None,
        *,
        shadow: int = 0,
        timeout_s: float | None = None,
    ) -> Model:
        """Share the requests for "NAME@ALIAS": version → its part (0.1), the alias's own has the rest.

        `shadow`: a version that gets copies, which are counted in the metrics and answered to nobody. Without
        either, and when the alias moves, its own version answers all again.
        """
        return await self._run(codec.set_traffic(model, shares or {}, shadow), timeout_s)

    async def delete_alias(self, name: str, alias: str, *, timeout_s: float | None = None) -> None:
        """Remove NAME@ALIAS; the version stays."""
        await self._run(codec.delete_alias(name, alias), timeout_s)

    async def delete_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Remove "NAME:VERSION". `ModelStateError` while it is loaded or an alias points at it."""
        await self._run(codec.delete_model(model), timeout_s)
