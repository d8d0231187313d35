"""Published models, synchronously: listed, loaded, named. Part of `Client`."""

from __future__ import annotations

from collections.abc import Mapping

import cliptune.codec as codec
from cliptune.client.connection import Connection
from cliptune.model import Model


class ModelCalls(Connection):
    """ModelService."""

    def list_models(self, name: str = "", *, timeout_s: float | None = None) -> list[Model]:
        """Every published version, or those of one name."""
        return self._run(codec.list_models(name), timeout_s)

    def get_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """The version that "NAME", "NAME:VERSION" or "NAME@ALIAS" means."""
        return self._run(codec.get_model(model), timeout_s)

    def load_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Load for inference; returns when it has answered a canary."""
        return self._run(codec.load_model(model), timeout_s)

    def unload_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Stop serving it; requests in flight and bulk streams that use it are answered first."""
        return self._run(codec.unload_model(model), timeout_s)

    def set_alias(self, model: str, alias: str, *, timeout_s: float | None = None) -> Model:
        """Point NAME@ALIAS at a version; where the alias is served, no request fails meanwhile."""
        return self._run(codec.set_alias(model, alias), timeout_s)

    def set_traffic(
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
        return self._run(codec.set_traffic(model, shares or {}, shadow), timeout_s)

    def delete_alias(self, name: str, alias: str, *, timeout_s: float | None = None) -> None:
        """Remove NAME@ALIAS; the version stays."""
        self._run(codec.delete_alias(name, alias), timeout_s)

    def delete_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Remove "NAME:VERSION". `ModelStateError` while it is loaded or an alias points at it."""
        self._run(codec.delete_model(model), timeout_s)
