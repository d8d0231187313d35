"""The app without a daemon below it, for what is answered before a route reaches one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
from fastapi import FastAPI

from cliptune_server.gateway.app import build_app
from cliptune_server.gateway.context import GatewayContext
from cliptune_server.metrics import Metrics
from cliptune_server.readiness import Readiness

MAX_BODY_BYTES = 10_000


def bare_context(**changed: Any) -> GatewayContext:
    """A context whose application objects are absent: touching one is a bug, and a 500."""
    absent = cast("Any", None)
    parts = {
        "jobs": absent,
        "router": absent,
        "open_inference": absent,
        "models": absent,
        "datasets": absent,
        "engines": absent,
        "readiness": Readiness(),
        "metrics": Metrics(),
        "max_body_bytes": MAX_BODY_BYTES,
    }
    return GatewayContext(**{**parts, **changed})


def bare_app() -> FastAPI:
    return build_app(bare_context())


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cliptune") as client:
        yield client
