"""Mixed inputs of /v1/embeddings: images and texts in one list, one answer in their order.

In: the parsed inputs and the router. Out: OpenAI's answer as a JSON object. Images and texts go to the router
as the two calls that the contract has; what came back is laid out by the inputs' own places.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cliptune.errors import (
    ImageDecodeError,
    ImageSizeError,
    InvalidInputError,
    TensorError,
    TextError,
    to_detail,
)
from cliptune.v1 import error_pb2, inference_pb2, tensor_pb2
from cliptune_server.gateway import forms
from cliptune_server.gateway.messages import json_form

if TYPE_CHECKING:
    from cliptune_server.inference.router import Router

_ITEM_ERRORS: Final = (ImageDecodeError, ImageSizeError, TensorError, TextError)
_Answer = inference_pb2.EmbedImagesResponse | inference_pb2.EmbedTextsResponse


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Images and texts, each with its place in the request."""

    images: Sequence[tuple[int, tensor_pb2.Image]]
    texts: Sequence[tuple[int, str]]

    @classmethod
    def parse(cls, given: forms.Inputs) -> Inputs:
        """Of a request's `input`. InvalidInputError for an empty list."""
        items = given if isinstance(given, list) else [given]
        if not items:
            raise InvalidInputError("input is empty", path="input")
        images: list[tuple[int, tensor_pb2.Image]] = []
        texts: list[tuple[int, str]] = []
        for place, item in enumerate(items):
            if isinstance(item, forms.ImageInput):
                images.append((place, forms.image_message(item.image, f"input[{place}].image")))
            else:
                texts.append((place, item.text if isinstance(item, forms.TextInput) else item))
        return cls(images=images, texts=texts)

    def __len__(self) -> int:
        return len(self.images) + len(self.texts)


async def embed(
    router: Router,
    model: str,
    inputs: Inputs,
    encoding: forms.Encoding,
    *,
    dimensions: int | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """The answer in the form of an EmbeddingsAnswer. Fails as a whole with what the router raises."""
    alone = len(inputs) == 1
    rows: list[list[float] | str | None] = [None] * len(inputs)
    errors: list[error_pb2.ItemError] = []
    version = ""

    async def run(places: Sequence[int], call: Awaitable[_Answer]) -> str:
        try:
            answer = await call
        except _ITEM_ERRORS as error:  # a call of one item fails with the item's own status
            if alone or len(places) > 1:
                raise
            errors.append(error_pb2.ItemError(field="input", index=places[0], error=to_detail(error)))
            return ""
        size = answer.embeddings.shape[-1]
        if dimensions not in (None, size):
            raise InvalidInputError(
                f"dimensions is {dimensions}; {answer.model} has {size}", path="dimensions"
            )
        for place, values in zip(places, forms.embedding_values(answer.embeddings, encoding), strict=True):
            rows[place] = values
        for item in answer.errors:
            errors.append(error_pb2.ItemError(field="input", index=places[item.index], error=item.error))
        return answer.model

    if inputs.images:
        images = inference_pb2.EmbedImagesRequest(model=model, images=[image for _, image in inputs.images])
        version = await run([place for place, _ in inputs.images], router.embed_images(images, timeout_s))
    if inputs.texts:
        # The same version for both, also while an alias moves.
        texts = inference_pb2.EmbedTextsRequest(
            model=version or model, texts=[text for _, text in inputs.texts]
        )
        version = (
            await run([place for place, _ in inputs.texts], router.embed_texts(texts, timeout_s)) or version
        )
    return {
        "object": "list",
        "model": version or model,
        "data": [
            {"object": "embedding", "index": place, "embedding": values} for place, values in enumerate(rows)
        ],
        "usage": {
            "prompt_tokens": 0,
            "total_tokens": 0,
            "texts": len(inputs.texts),
            "images": len(inputs.images),
        },
        "errors": [json_form(error) for error in sorted(errors, key=lambda error: error.index)],
    }
