"""The FastAPI app: routes, the translation of every error, and what surrounds a request.

In: a GatewayContext. Out: an ASGI app that the daemon runs under uvicorn on its own loop.
"""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse

from cliptune.errors import CliptuneError
from cliptune_server.gateway import datasets, health, inference, jobs, models, open_inference, uploads
from cliptune_server.gateway.context import GatewayContext
from cliptune_server.gateway.docs_page import docs_page
from cliptune_server.gateway.middleware import BodyLimit, Surroundings
from cliptune_server.gateway.openapi import openapi_of
from cliptune_server.gateway.problems import (
    on_cliptune_error,
    on_http_exception,
    on_unicode_error,
    on_validation_error,
)

_DESCRIPTION = """\
Fine-tune CLIP for your domain, watch it learn, serve it.

Every error is `application/problem+json`; its `reason` is the class that the SDK raises. In a request of
several items each fails alone: its row is `null` and `errors` says why. A request of one item fails with that
item's status.
"""


def build_app(context: GatewayContext) -> FastAPI:
    """The REST face over these application objects."""
    app = FastAPI(
        title="cliptune",
        version=importlib.metadata.version("cliptune"),
        summary="Fine-tune CLIP, watch it learn, serve it.",
        description=_DESCRIPTION,
        middleware=[
            Middleware(Surroundings, metrics=context.metrics),
            Middleware(BodyLimit, max_body_bytes=context.max_body_bytes),
        ],
        exception_handlers={
            CliptuneError: on_cliptune_error,
            RequestValidationError: on_validation_error,
            ValidationError: on_validation_error,
            HTTPException: on_http_exception,
            UnicodeEncodeError: on_unicode_error,
        },
        redirect_slashes=False,
        # FastAPI's own pages fetch their script from the network, which may not be there.
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        # Its own spans (0.140 and later) would stand between ours.
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.context = context
    for room in (inference, open_inference, jobs, models, datasets, uploads, health):
        app.include_router(room.router)
    app.openapi = openapi_of(app)  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    return app
