"""Routes of inference: embeddings (a superset of OpenAI's), similarity, pair scores, classification."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, File, Form, UploadFile
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile as UploadedFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cliptune.errors import InvalidInputError
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, tensor_pb2
from cliptune_server.gateway import forms
from cliptune_server.gateway.context import context_of
from cliptune_server.gateway.embedding import Inputs, embed
from cliptune_server.gateway.messages import json_form
from cliptune_server.gateway.middleware import bulk_of, timeout_of
from cliptune_server.gateway.problems import invalid, problems

router = APIRouter(prefix="/v1", tags=["inference"])
_FAILURES: Final = problems(404, 409, 413, 429, 503, 504)
_MULTIPART: Final = "multipart/form-data"
_EXAMPLE_CLASSES: Final = '["cracked cell", "intact cell"]'
_CLASSES: Final = TypeAdapter(list[forms.ClassField])


@router.post(
    "/embeddings",
    summary="Embed texts and images",
    response_model=forms.EmbeddingsAnswer,
    responses=_FAILURES,
)
async def create_embeddings(request: Request, body: forms.EmbeddingsBody) -> Response:
    """OpenAI's embeddings call; an input may also be an image: `{"image": "<base64 or data URL>"}`.

    A plain string is a text, or an image if it is a data URL of one; with `modality: image` every string is.
    In a request of several inputs each fails alone: its `embedding` is null and `errors` says why.
    """
    context = context_of(request)
    inputs = await Inputs.parse(body.input, body.modality).fetched(context.image_urls)
    return JSONResponse(
        await embed(
            context.router,
            body.model,
            inputs,
            body.encoding_format,
            dimensions=body.dimensions,
            resolution=body.resolution,
            timeout_s=timeout_of(request),
            bulk=bulk_of(request),
        )
    )


@router.post(
    "/embed/images",
    summary="Embed uploaded images",
    response_model=forms.EmbeddingsAnswer,
    responses=_FAILURES,
)
async def embed_images(
    request: Request,
    images: Annotated[list[UploadFile], File(description="One or several image files.")],
    model: Annotated[str, Form(description="NAME, NAME:VERSION or NAME@ALIAS. Empty: the only one.")] = "",
    encoding_format: Annotated[forms.Encoding, Form()] = "float",
    resolution: Annotated[str, Form(description="As in /v1/embeddings.", max_length=16)] = "",
) -> Response:
    """The same answer as /v1/embeddings, for files: `curl -F images=@a.jpg -F images=@b.jpg`."""
    read = [tensor_pb2.Image(encoded=await upload.read()) for upload in images]
    inputs = Inputs(images=tuple(enumerate(read)))
    return JSONResponse(
        await embed(
            context_of(request).router,
            model,
            inputs,
            encoding_format,
            resolution=resolution,
            timeout_s=timeout_of(request),
            bulk=bulk_of(request),
        )
    )


@router.post(
    "/similarity",
    summary="Every image against every text",
    response_model=forms.SimilarityAnswer,
    responses=_FAILURES,
)
async def similarity(request: Request, body: forms.SimilarityBody) -> Response:
    """Similarities [images][texts], by the model's own; multiply by `logit_scale` before a softmax."""
    wanted = inference_pb2.SimilarityRequest(
        model=body.model,
        images=forms.image_messages(body.images),
        texts=body.texts,
        resolution=body.resolution,
    )
    answer = await context_of(request).router.similarity(wanted, timeout_of(request), bulk=bulk_of(request))
    return JSONResponse(
        {
            "model": answer.model,
            "scores": [forms.numbers(row) for row in unpack(answer.scores)],
            "logit_scale": answer.logit_scale,
            "errors": [json_form(error) for error in answer.errors],
        }
    )


@router.post(
    "/score-pairs",
    summary="Image i against text i",
    response_model=forms.ScorePairsAnswer,
    responses=_FAILURES,
)
async def score_pairs(request: Request, body: forms.ScorePairsBody) -> Response:
    """Similarity of each pair, by the model's own."""
    pairs = [
        inference_pb2.ImageTextPair(
            image=forms.image_message(pair.image, f"pairs[{i}].image"), text=pair.text
        )
        for i, pair in enumerate(body.pairs)
    ]
    wanted = inference_pb2.ScorePairsRequest(model=body.model, pairs=pairs, resolution=body.resolution)
    answer = await context_of(request).router.score_pairs(wanted, timeout_of(request), bulk=bulk_of(request))
    return JSONResponse(
        {
            "model": answer.model,
            "scores": forms.numbers(unpack(answer.scores)),
            "logit_scale": answer.logit_scale,
            "errors": [json_form(error) for error in answer.errors],
        }
    )


# One route takes both forms, so FastAPI cannot derive the body; `openapi.py` puts its schema in.
_CLASSIFY_BODY: Final[dict[str, Any]] = {
    "required": True,
    "content": {
        "application/json": {"schema": {"x-model": "ClassifyBody"}},
        _MULTIPART: {
            "schema": {
                "type": "object",
                "required": ["images", "classes"],
                "properties": {
                    "images": {
                        "type": "array",
                        "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                    },
                    "classes": {
                        "type": "string",
                        "description": "JSON, as in the other form.",
                        "examples": [_EXAMPLE_CLASSES],
                    },
                    "model": {"type": "string", "default": ""},
                    "resolution": {"type": "string", "default": ""},
                },
            }
        },
    },
}


@router.post(
    "/classify",
    summary="Zero-shot classification",
    response_model=forms.ClassifyAnswer,
    responses=_FAILURES,
    openapi_extra={"requestBody": _CLASSIFY_BODY},
)
async def classify(request: Request) -> Response:
    """Softmax over the classes, with prompt ensembling. JSON with base64 images, or files as multipart:

    `curl -F images=@a.jpg -F 'classes=["cracked cell", "intact cell"]'`.
    """
    multipart = request.headers.get("content-type", "").lower().startswith(_MULTIPART)
    wanted = await (_classify_form(request) if multipart else _classify_json(request))
    answer = await context_of(request).router.classify(wanted, timeout_of(request), bulk=bulk_of(request))
    return JSONResponse(
        {
            "model": answer.model,
            "labels": list(answer.labels),
            "predictions": forms.predictions(answer),
            "probabilities": forms.float_rows(answer.probabilities),
            "scores": forms.float_rows(answer.scores),
            "errors": [json_form(error) for error in answer.errors],
        }
    )


async def _classify_json(request: Request) -> inference_pb2.ClassifyRequest:
    try:
        body = forms.ClassifyBody.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid(error.errors()) from None
    return inference_pb2.ClassifyRequest(
        model=body.model,
        images=forms.image_messages(body.images),
        classes=forms.class_messages(body.classes),
        resolution=body.resolution,
    )


async def _classify_form(request: Request) -> inference_pb2.ClassifyRequest:
    async with request.form() as form:
        uploads = form.getlist("images")
        classes, model, resolution = (form.get("classes"), form.get("model", ""), form.get("resolution", ""))
        if not isinstance(classes, str):
            raise InvalidInputError(
                f"the form needs a field `classes` with JSON, such as {_EXAMPLE_CLASSES}", path="classes"
            )
        if not isinstance(model, str):
            raise InvalidInputError("`model` is a name, not a file", path="model")
        if not isinstance(resolution, str):
            raise InvalidInputError("`resolution` is a size, not a file", path="resolution")
        images = []
        for i, upload in enumerate(uploads):
            if not isinstance(upload, UploadedFile):
                raise InvalidInputError(f"images[{i}] is a text, not a file", path=f"images[{i}]")
            images.append(tensor_pb2.Image(encoded=await upload.read()))
    try:
        parsed = _CLASSES.validate_json(classes)
    except ValidationError as error:
        places = [{**each, "loc": ("classes", *each["loc"])} for each in error.errors()]
        raise invalid(places, f"; the field is JSON, such as {_EXAMPLE_CLASSES}") from None
    return inference_pb2.ClassifyRequest(
        model=model, images=images, classes=forms.class_messages(parsed), resolution=resolution
    )
