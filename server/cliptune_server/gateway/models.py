"""Routes of published models: `/v1/models`, a superset of OpenAI's list."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cliptune.v1 import model_pb2
from cliptune_server.catalog.traffic import Traffic
from cliptune_server.gateway.context import context_of
from cliptune_server.gateway.messages import json_form
from cliptune_server.gateway.problems import problems

router = APIRouter(prefix="/v1/models", tags=["models"])
Reference = Annotated[
    str, Path(description="NAME (its newest version), NAME:VERSION or NAME@ALIAS.", examples=["cells@prod"])
]
Alias = Annotated[str, Path(examples=["prod"])]


class ModelCard(BaseModel):
    """One published version."""

    id: str = Field(description="NAME:VERSION.", examples=["solar-cells:3"])
    object: str = Field(default="model", description="Always `model`.")
    created: int = Field(description="Unix time in seconds.")
    owned_by: str = Field(description="The job that trained it, or `cliptune` for a model from elsewhere.")
    name: str
    version: int
    aliases: list[str]
    loaded: bool
    created_at: str = Field(description="The same as `created`, by RFC 3339.")
    bytes: int = Field(description="Size on disk.")
    architecture: str
    embedding_dim: int
    image_size: int
    job_id: str
    metrics: dict[str, float | None]
    path: str = Field(description="Folder in open_clip's own format, on the daemon's machine.")
    device: str = Field(description="The device that serves it. Empty: not loaded.")


class ModelList(BaseModel):
    """All published versions."""

    object: str = Field(default="list", description="Always `list`.")
    data: list[ModelCard]


def card(model: model_pb2.Model) -> dict[str, Any]:
    """A model in the form of a ModelCard."""
    form = json_form(model)
    return {
        "id": f"{model.name}:{model.version}",
        "object": "model",
        **form,
        "created": model.created.seconds,
        "owned_by": model.job_id or "cliptune",
        "created_at": model.created.ToJsonString(),
    }


@router.get("", summary="List models", response_model=ModelList)
async def list_models(
    request: Request, name: Annotated[str, Query(description="Only this name. Empty: all.")] = ""
) -> Response:
    """Every published version, in OpenAI's form with more fields."""
    listed = await context_of(request).models.list(model_pb2.ListModelsRequest(name=name))
    return JSONResponse({"object": "list", "data": [card(model) for model in listed.models]})


@router.get("/{model}", summary="Get a model", response_model=ModelCard, responses=problems(404))
async def get_model(request: Request, model: Reference) -> Response:
    """One version."""
    return JSONResponse(card(await context_of(request).models.get(model)))


@router.post(
    "/{model}/load", summary="Load a model", response_model=ModelCard, responses=problems(404, 409, 503)
)
async def load_model(request: Request, model: Reference) -> Response:
    """Returns when the model has answered a canary."""
    return JSONResponse(card(await context_of(request).models.load(model)))


@router.post(
    "/{model}/unload", summary="Unload a model", response_model=ModelCard, responses=problems(404, 409)
)
async def unload_model(request: Request, model: Reference) -> Response:
    """Requests in flight are answered first."""
    return JSONResponse(card(await context_of(request).models.unload(model)))


@router.put(
    "/{model}/aliases/{alias}",
    summary="Set an alias",
    response_model=ModelCard,
    responses=problems(404, 409, 503),
)
async def set_alias(request: Request, model: Reference, alias: Alias) -> Response:
    """Points NAME@ALIAS at this version.

    If the alias was being served, the new version is loaded before it moves and no request fails.
    """
    return JSONResponse(card(await context_of(request).models.set_alias(model, alias)))


class TrafficBody(BaseModel):
    """How the requests for an alias are shared."""

    model_config = ConfigDict(extra="forbid")
    shares: dict[int, float] = Field(
        default={}, description="Version → its part of the requests.", examples=[{"2": 0.1}]
    )
    shadow: int = Field(default=0, description="Version that gets a copy of each request. 0: none.")


@router.put(
    "/{model}/aliases/{alias}/traffic",
    summary="Share an alias's requests",
    response_model=ModelCard,
    responses=problems(404, 503),
)
async def set_traffic(
    request: Request,
    model: Annotated[str, Path(description="The model's NAME.")],
    alias: Alias,
    body: TrafficBody,
) -> Response:
    """Among versions, and copies of them to one in the background; an empty body ends both.

    The version that the alias points at has what is left. Moving the alias ends both, too.
    """
    traffic = Traffic(shares=body.shares, shadow=body.shadow)
    return JSONResponse(card(await context_of(request).models.set_traffic(f"{model}@{alias}", traffic)))


@router.delete(
    "/{model}/aliases/{alias}", summary="Delete an alias", status_code=204, responses=problems(404)
)
async def delete_alias(
    request: Request, model: Annotated[str, Path(description="The model's NAME.")], alias: Alias
) -> Response:
    """The version that it points at stays."""
    await context_of(request).models.delete_alias(model, alias)
    return Response(status_code=204)


@router.delete("/{model}", summary="Delete a version", status_code=204, responses=problems(404, 409))
async def delete_model(request: Request, model: Reference) -> Response:
    """NAME:VERSION. Refused while it is loaded or an alias points at it."""
    await context_of(request).models.delete(model)
    return Response(status_code=204)
