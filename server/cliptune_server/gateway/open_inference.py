"""Routes of the Open Inference Protocol: `/v2/…`, JSON, with binary tensors behind it where a client wants.

A body is JSON, or JSON and then the bytes of its binary tensors; a header says where the JSON ends. Errors
are `{"error": "…"}`, as the protocol has them (`problems.py`). In JSON an element of BYTES is a string: the
text itself, or an image file in base64.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

import numpy as np
from fastapi import APIRouter
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cliptune.errors import InvalidInputError, RequestTooLargeError, TensorError, UnavailableError
from cliptune_server.gateway import forms
from cliptune_server.gateway.context import context_of
from cliptune_server.gateway.middleware import bulk_of, timeout_of
from cliptune_server.gateway.problems import invalid
from cliptune_server.open_inference.inference import (
    EXTENSIONS,
    IMAGE,
    NAME,
    PLATFORM,
    InferAnswer,
    InferRequest,
    TensorForm,
)
from cliptune_server.open_inference.tensors import BYTES, Tensor

router = APIRouter(prefix="/v2", tags=["open inference"])
# Parsed, a number takes some twenty times its digits; binary tensors take their bytes.
_JSON_BYTES: Final = 32 * 1024 * 1024
_LENGTH_HEADER: Final = "Inference-Header-Content-Length"
Model = Annotated[str, InPath(description="NAME, or a reference such as NAME@ALIAS.")]
Version = Annotated[str, InPath(description="A number.")]


class _Lenient(BaseModel):
    """Fields that other servers know are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)


class InputForm(_Lenient):
    """One input."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputForm(_Lenient):
    """One output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferForm(_Lenient):
    """The JSON of a request."""

    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: list[InputForm]
    outputs: list[OutputForm] = Field(default_factory=list)


class ServerForm(BaseModel):
    """The server."""

    name: str
    version: str
    extensions: list[str]


@router.get("", summary="What this server is", response_model=ServerForm)
async def server_metadata(request: Request) -> Response:
    """Name, version, and the extensions of the protocol."""
    version = context_of(request).open_inference.version
    return JSONResponse({"name": NAME, "version": version, "extensions": list(EXTENSIONS)})


@router.get("/health/live", summary="Is the server alive?", response_class=Response)
async def server_live(request: Request) -> Response:
    """200, with an empty body."""
    return Response()


@router.get("/health/ready", summary="Are requests answered?", response_class=Response)
async def server_ready(request: Request) -> Response:
    """200 when every loaded model has answered a canary."""
    if not context_of(request).open_inference.ready:
        raise UnavailableError("the server is not ready")
    return Response()


@router.get("/models/{model}/ready", summary="Is this model loaded?", response_class=Response)
@router.get(
    "/models/{model}/versions/{version}/ready",
    summary="Is this version loaded?",
    response_class=Response,
    name="version_ready",
)
async def model_ready(request: Request, model: Model, version: str = "") -> Response:
    """200 when it is."""
    if not await context_of(request).open_inference.model_ready(model, version):
        raise UnavailableError(f"model {model} is not ready", model=model)
    return Response()


@router.get("/models/{model}", summary="What a model takes and gives")
@router.get(
    "/models/{model}/versions/{version}", summary="What a version takes and gives", name="version_metadata"
)
async def model_metadata(request: Request, model: Model, version: str = "") -> Response:
    """Names, types and shapes of its inputs and outputs; -1: any length."""
    form = await context_of(request).open_inference.model_form(model, version)
    return JSONResponse(
        {
            "name": form.name,
            "versions": list(form.versions),
            "platform": PLATFORM,
            "inputs": [_form(each) for each in form.inputs],
            "outputs": [_form(each) for each in form.outputs],
        }
    )


@router.post("/models/{model}/infer", summary="Embeddings and similarities")
@router.post(
    "/models/{model}/versions/{version}/infer",
    summary="Embeddings and similarities by one version",
    name="version_infer",
)
async def model_infer(request: Request, model: Model, version: str = "") -> Response:
    """`image`: BYTES [N], UINT8 or FP32 [N, H, W, 3]; `text`: BYTES [N]."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise InvalidInputError(f"a body in {encoding!r} is not taken; send it uncompressed")
    body = await request.body()
    told = request.headers.get(_LENGTH_HEADER)
    length = len(body) if told is None else _length(told, len(body))
    if length > _JSON_BYTES:
        raise RequestTooLargeError(
            f"the JSON of the request has {length:,} bytes; at most {_JSON_BYTES:,} are taken: send large"
            " tensors in binary",
            limit=_JSON_BYTES,
        )
    try:
        form = InferForm.model_validate_json(body[:length])
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise InvalidInputError(f"the body is not JSON: {error.errors()[0]['msg']}") from None
        raise invalid(error.errors()) from None
    answer = await context_of(request).open_inference.infer(
        InferRequest(
            model=model,
            version=version,
            inputs=_inputs(form, body[length:]),
            outputs=[each.name for each in form.outputs],
            parameters=form.parameters,
        ),
        timeout_of(request),
        bulk=bulk_of(request),
    )
    return _answered(form, model, answer)


def _length(told: str, size: int) -> int:
    if not (told.isascii() and told.isdecimal() and int(told) <= size):
        raise InvalidInputError(f"{_LENGTH_HEADER} is {told!r}; the body has {size:,} bytes")
    return int(told)


def _inputs(form: InferForm, binary: bytes) -> list[Tensor]:
    found: list[Tensor] = []
    place = 0
    for given in form.inputs:
        size = given.parameters.get("binary_data_size")
        if size is None:
            values = list(_flat(given.data or []))
            if given.datatype == BYTES:
                values = [_element(given.name, each, number) for number, each in enumerate(values)]
            found.append(Tensor.from_elements(given.name, given.datatype, given.shape, values))
            continue
        if not isinstance(size, int) or size < 0 or place + size > len(binary):
            raise TensorError(
                f"input {given.name!r}: binary_data_size is {size!r}; {len(binary) - place:,} bytes follow",
                path=given.name,
            )
        raw = binary[place : place + size]
        found.append(Tensor.from_raw(given.name, given.datatype, given.shape, raw))
        place += size
    if place != len(binary):
        raise TensorError(f"{len(binary) - place:,} bytes behind the JSON belong to no input", path="inputs")
    return found


def _flat(data: list[Any]) -> list[Any]:
    """Nested lists are allowed beside flat ones; their nesting says nothing that the shape does not."""
    while data and all(isinstance(each, list) for each in data):
        data = [one for each in data for one in each]
    return data


def _element(name: str, value: object, place: int) -> bytes:
    if not isinstance(value, str):
        raise TensorError(f"input {name!r}: element {place} is no string", path=name)
    if name == IMAGE:
        return forms.unwrap(value, f"{name}[{place}]")
    return value.encode("utf-8", "surrogatepass")


def _answered(form: InferForm, model: str, answer: InferAnswer) -> Response:
    as_binary = {
        each.name: bool(each.parameters["binary_data"])
        for each in form.outputs
        if "binary_data" in each.parameters
    }
    usual = bool(form.parameters.get("binary_data_output"))
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for output in answer.outputs:
        told: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if as_binary.get(output.name, usual):
            blobs.append(output.raw())
            told["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            told["data"] = forms.numbers(np.asarray(output.array).reshape(-1))
        outputs.append(told)
    head: dict[str, Any] = {"model_name": model, "model_version": answer.version, "outputs": outputs}
    if form.id:
        head["id"] = form.id
    if answer.parameters:
        head["parameters"] = dict(answer.parameters)
    if not blobs:
        return JSONResponse(head)
    text = json.dumps(head, allow_nan=False).encode()
    return Response(
        b"".join((text, *blobs)),
        headers={_LENGTH_HEADER: str(len(text))},
        media_type="application/octet-stream",
    )


def _form(form: TensorForm) -> dict[str, Any]:
    return {"name": form.name, "datatype": form.datatype, "shape": list(form.shape)}
