"""Published models and readiness over REST, against a real daemon."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.support.daemon import running_daemon
from tests.support.models import publish_test_model


def test_models_are_loaded_named_and_removed_over_rest(tmp_path: Path) -> None:
    home = tmp_path / "home"
    publish_test_model(home, "shapes", seed=1)
    publish_test_model(home, "shapes", seed=2)
    with (
        running_daemon(home, wait_ready=False) as daemon,
        httpx.Client(base_url=daemon.url, timeout=60) as rest,
    ):
        assert rest.get("/healthz").json() == {"status": "alive"}
        early = rest.get("/readyz")  # the engine is a process that takes seconds to start
        assert early.status_code == 503
        assert early.json()["reason"] == "UnavailableError"
        assert "engine" in early.json()["detail"]
        daemon.wait_ready()
        assert rest.get("/readyz").json() == {"status": "ready"}

        assert [card["id"] for card in rest.get("/v1/models").json()["data"]] == ["shapes:2", "shapes:1"]
        assert rest.get("/v1/models", params={"name": "other"}).json()["data"] == []
        unloaded = rest.post("/v1/embeddings", json={"model": "shapes:1", "input": "a"})
        assert (unloaded.status_code, unloaded.json()["reason"]) == (409, "ModelStateError")

        assert rest.put("/v1/models/shapes:1/aliases/prod").json()["aliases"] == ["prod"]
        assert rest.post("/v1/models/shapes@prod/load").json()["loaded"] is True
        first = rest.post("/v1/embeddings", json={"model": "shapes@prod", "input": "a"}).json()
        moved = rest.put("/v1/models/shapes:2/aliases/prod").json()
        assert (moved["id"], moved["loaded"]) == ("shapes:2", True)
        second = rest.post("/v1/embeddings", json={"model": "shapes@prod", "input": "a"}).json()
        assert (first["model"], second["model"]) == ("shapes:1", "shapes:2")
        assert first["data"] != second["data"]

        held = rest.delete("/v1/models/shapes:2")
        assert (held.status_code, held.json()["reason"]) == (409, "ModelStateError")
        assert rest.post("/v1/models/shapes:2/unload").json()["loaded"] is False
        assert rest.delete("/v1/models/shapes/aliases/prod").status_code == 204
        assert rest.get("/v1/models/shapes:2").json()["aliases"] == []
        assert rest.delete("/v1/models/shapes:2").status_code == 204
        gone = rest.get("/v1/models/shapes:2")
        assert (gone.status_code, gone.json()["reason"]) == (404, "ModelNotFoundError")
