"""Mixed inputs of /v1/embeddings: images and texts in one list, one answer in their order.

In: the parsed inputs and the router. Out: OpenAI's answer as a JSON object. Images and texts go to the router
as the two calls that the contract has; what came back is laid out by the inputs' own places.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from cliptune.errors import (
    CliptuneError,
    ImageDecodeError,
    ImageSizeError,
    InvalidInputError,
    TensorError,
    TextError,
    to_detail,
)
from cliptune.v1 import error_pb2, inference_pb2, tensor_pb2
from cliptune_server.gateway import forms
from cliptune_server.gateway.image_urls import ImageUrls, fetch_all, is_url
from cliptune_server.gateway.messages import json_form

if TYPE_CHECKING:
    from cliptune_server.inference.router import Router

_ITEM_ERRORS: Final = (ImageDecodeError, ImageSizeError, TensorError, TextError)
_Answer = inference_pb2.EmbedImagesResponse | inference_pb2.EmbedTextsResponse


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Images, texts and addresses of images, each with its place in the request."""

    images: Sequence[tuple[int, tensor_pb2.Image]]
    texts: Sequence[tuple[int, str]] = ()
    links: Sequence[tuple[int, str]] = ()
    failed: Mapping[int, CliptuneError] = field(default_factory=dict)
    """Images that were not there."""

    @classmethod
    def parse(cls, given: forms.Inputs, modality: str | None = None) -> Inputs:
        """Of a request's `input`. InvalidInputError for an empty list.

        `modality`: what plain strings are; None: images where they are data URLs of images.
        """
        items = given if isinstance(given, list) else [given]
        if not items:
            raise InvalidInputError("input is empty", path="input")
        images: list[tuple[int, tensor_pb2.Image]] = []
        texts: list[tuple[int, str]] = []
        links: list[tuple[int, str]] = []
        for place, item in enumerate(items):
            if isinstance(item, forms.TextInput):
                texts.append((place, item.text))
                continue
            if isinstance(item, forms.ImageInput):
                image, where = item.image, f"input[{place}].image"
            elif modality == "image" or (modality is None and forms.is_data_url(item)):
                image, where = item, f"input[{place}]"
            else:
                texts.append((place, item))
                continue
            if isinstance(image, str) and is_url(image):
                links.append((place, image))
            else:
                images.append((place, forms.image_message(image, where)))
        return cls(images=images, texts=texts, links=links)

    async def fetched(self, urls: ImageUrls) -> Inputs:
        """With the images behind the addresses. InvalidInputError where one may not be fetched."""
        if not self.links:
            return self
        images, failed = list(self.images), dict(self.failed)
        for (place, _), found in zip(self.links, await fetch_all(urls, self.links), strict=True):
            if isinstance(found, bytes):
                images.append((place, tensor_pb2.Image(encoded=found)))
            else:
                failed[place] = found
        if failed and len(self) == 1:
            raise failed[0]
        return replace(self, images=sorted(images, key=lambda each: each[0]), links=(), failed=failed)

    def __len__(self) -> int:
        return len(self.images) + len(self.texts) + len(self.links) + len(self.failed)


async def embed(
    router: Router,
    model: str,
    inputs: Inputs,
    encoding: forms.Encoding,
    *,
    dimensions: int | None = None,
    resolution: str = "",
    timeout_s: float | None = None,
    bulk: bool = False,
) -> dict[str, Any]:
    """The answer in the form of an EmbeddingsAnswer. Fails as a whole with what the router raises."""
    alone = len(inputs) == 1
    rows: list[list[float] | str | None] = [None] * len(inputs)
    errors = [
        error_pb2.ItemError(field="input", index=place, error=to_detail(error))
        for place, error in inputs.failed.items()
    ]
    version, tokens = "", 0

    async def run(places: Sequence[int], call: Awaitable[_Answer]) -> str:
        try:
            answer = await call
        except _ITEM_ERRORS as error:  # a call of one item fails with the item's own status
            if alone or len(places) > 1:
                raise
            errors.append(error_pb2.ItemError(field="input", index=places[0], error=to_detail(error)))
            return ""
        nonlocal tokens
        if isinstance(answer, inference_pb2.EmbedTextsResponse):
            tokens += answer.tokens
        for place, values in zip(places, forms.embedding_values(answer.embeddings, encoding), strict=True):
            rows[place] = values
        for item in answer.errors:
            errors.append(error_pb2.ItemError(field="input", index=places[item.index], error=item.error))
        return answer.model

    if inputs.images:
        images = inference_pb2.EmbedImagesRequest(
            model=model,
            images=[image for _, image in inputs.images],
            dimensions=dimensions or 0,
            resolution=resolution,
        )
        version = await run(
            [place for place, _ in inputs.images], router.embed_images(images, timeout_s, bulk=bulk)
        )
    if inputs.texts:
        # The same version for both, also while an alias moves.
        texts = inference_pb2.EmbedTextsRequest(
            model=version or model, texts=[text for _, text in inputs.texts], dimensions=dimensions or 0
        )
        places = [place for place, _ in inputs.texts]
        version = await run(places, router.embed_texts(texts, timeout_s, bulk=bulk)) or version
    return {
        "object": "list",
        "model": version or model,
        "data": [
            {"object": "embedding", "index": place, "embedding": values} for place, values in enumerate(rows)
        ],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "texts": len(inputs.texts),
            "images": len(inputs) - len(inputs.texts),
        },
        "errors": [json_form(error) for error in sorted(errors, key=lambda error: error.index)],
    }
