"""What the engine is asked for: embeddings, and what follows from them.

Enters: public request messages whose `model` is a loaded key. Leaves: public responses. Called by the
servicer. Each item goes its way by itself, in `embedding.py`; the answers are put together here.

Shape suffixes: N images or pairs, M texts, C classes, D embedding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cliptune.errors import InvalidInputError
from cliptune.tensors import pack
from cliptune.v1 import inference_pb2
from cliptune_server.engine.admission import Admission
from cliptune_server.engine.classes import (
    MIN_CLASSES,
    check_judged_together,
    check_labels,
    prompts_of,
    softmax,
)
from cliptune_server.engine.embedding import PROMPTS_AT_A_TIME, Embedder
from cliptune_server.engine.models import ModelSet, ServedModel
from cliptune_server.engine.payload import Picture, pictures
from cliptune_server.engine.rows import Rows, item_errors, raise_single
from cliptune_server.engine.scores import Scores
from cliptune_server.engine.spans import Caller

Vector = npt.NDArray[np.float32]


class Inference:
    """Requests in, responses out, over one `ModelSet`."""

    def __init__(
        self,
        *,
        models: ModelSet,
        embedder: Embedder,
        admission: Admission,
    ) -> None:
        self._models: Final = models
        self._embedder: Final = embedder
        self._admission: Final = admission

    async def embed_images(
        self, request: inference_pb2.EmbedImagesRequest, caller: Caller
    ) -> inference_pb2.EmbedImagesResponse:
        """Vectors of images, as the model's similarity gives them to clients."""
        self._admission.check_count("images", len(request.images))
        with (
            self._models.use(request.model) as model,
            self._admission.room(len(request.images), _bytes(request, caller), bulk=caller.bulk),
        ):
            rows = await self._embedder.images(model, _sent(request, caller), caller, request.resolution)
            rows.raise_single()
            vectors_ND = await _given(model.scores, model.scores.image_vectors, rows)
        return inference_pb2.EmbedImagesResponse(
            model=model.key,
            embeddings=pack(_cut(model, vectors_ND, request.dimensions)),
            errors=item_errors("images", rows.errors),
            profile=caller.timings.profile(),
        )

    async def embed_texts(
        self, request: inference_pb2.EmbedTextsRequest, caller: Caller
    ) -> inference_pb2.EmbedTextsResponse:
        """Vectors of texts, as the model's similarity gives them to clients."""
        self._admission.check_count("texts", len(request.texts))
        with (
            self._models.use(request.model) as model,
            self._admission.room(len(request.texts), _bytes(request, caller), bulk=caller.bulk),
        ):
            rows = await self._embedder.texts(model, request.texts, caller)
            rows.raise_single()
            vectors_ND = await _given(model.scores, model.scores.text_vectors, rows)
        return inference_pb2.EmbedTextsResponse(
            model=model.key,
            embeddings=pack(_cut(model, vectors_ND, request.dimensions)),
            errors=item_errors("texts", rows.errors),
            tokens=rows.tokens,
            profile=caller.timings.profile(),
        )

    async def similarity(
        self, request: inference_pb2.SimilarityRequest, caller: Caller
    ) -> inference_pb2.SimilarityResponse:
        """Every image against every text. A failed item's row or column is NaN."""
        self._admission.check_count("images", len(request.images))
        self._admission.check_count("texts", len(request.texts))
        count = len(request.images) + len(request.texts)
        with (
            self._models.use(request.model) as model,
            self._admission.room(count, _bytes(request, caller), bulk=caller.bulk),
        ):
            images, texts = await _both(
                self._embedder.images(model, _sent(request, caller), caller, request.resolution),
                self._embedder.texts(model, request.texts, caller),
            )
            images.raise_single()
            texts.raise_single()
            scores_NM = await asyncio.to_thread(model.scores.table, images.vectors, texts.vectors)
        return inference_pb2.SimilarityResponse(
            model=model.key,
            scores=pack(scores_NM),
            logit_scale=model.clip.logit_scale,
            errors=item_errors("images", images.errors) + item_errors("texts", texts.errors),
            profile=caller.timings.profile(),
        )

    async def score_pairs(
        self, request: inference_pb2.ScorePairsRequest, caller: Caller
    ) -> inference_pb2.ScorePairsResponse:
        """Image i against text i. A pair with a failed half is NaN; its image's error is told first."""
        self._admission.check_count("pairs", len(request.pairs))
        with (
            self._models.use(request.model) as model,
            self._admission.room(2 * len(request.pairs), _bytes(request, caller), bulk=caller.bulk),
        ):
            images, texts = await _both(
                self._embedder.images(model, _sent(request, caller), caller, request.resolution),
                self._embedder.texts(model, [pair.text for pair in request.pairs], caller),
            )
            errors = {**texts.errors, **images.errors}
            raise_single(errors, len(request.pairs))
            scores_N = await asyncio.to_thread(model.scores.pairs, images.vectors, texts.vectors)
        return inference_pb2.ScorePairsResponse(
            model=model.key,
            scores=pack(scores_N),
            logit_scale=model.clip.logit_scale,
            errors=item_errors("pairs", errors),
            profile=caller.timings.profile(),
        )

    async def classify(
        self, request: inference_pb2.ClassifyRequest, caller: Caller
    ) -> inference_pb2.ClassifyResponse:
        """Zero-shot: softmax over the classes of logit scale × similarity to a class's ensemble of prompts.

        A class with a failed prompt has NaN in its columns and the softmax is over the others; when fewer
        than two are left, the request fails with that prompt's error.
        """
        check_judged_together(request.classes)
        classes = [(one.label, prompts_of(one)) for one in request.classes]
        check_labels([label for label, _ in classes])
        self._admission.check_count("images", len(request.images))
        self._admission.check_count("classes", len(classes))
        prompts = sum(len(prompts) for _, prompts in classes)
        self._admission.check_count("prompts", prompts, self._admission.limits.request_prompts)
        count = len(request.images) + min(prompts, PROMPTS_AT_A_TIME)
        with (
            self._models.use(request.model) as model,
            self._admission.room(count, _bytes(request, caller), bulk=caller.bulk),
        ):
            images, texts = await _both(
                self._embedder.images(model, _sent(request, caller), caller, request.resolution),
                self._embedder.classes(model, [prompts for _, prompts in classes], caller),
            )
            images.raise_single()
            if len(classes) - len(texts.errors) < MIN_CLASSES:
                raise texts.errors[min(texts.errors)]
            scores_NC = await asyncio.to_thread(model.scores.table, images.vectors, texts.vectors)
        return inference_pb2.ClassifyResponse(
            model=model.key,
            labels=[label for label, _ in classes],
            probabilities=pack(softmax(model.clip.logit_scale * scores_NC.astype(np.float64))),
            scores=pack(scores_NC),
            errors=item_errors("images", images.errors) + item_errors("classes", texts.errors),
            profile=caller.timings.profile(),
        )


def _cut(model: ServedModel, vectors_ND: Vector, dimensions: int) -> Vector:
    """The first `dimensions` numbers of each embedding, of unit length again where the whole one was."""
    if dimensions in (0, model.dim):
        return vectors_ND
    allowed = ", ".join(map(str, (*model.trained_dims, model.dim)))
    if dimensions not in model.trained_dims:
        raise InvalidInputError(
            f"dimensions is {dimensions}; {model.key} was trained for {allowed}",
            path="dimensions",
            allowed=allowed,
        )
    if not model.scores.given_as_kept:
        raise InvalidInputError(
            f"embeddings of {model.key} are not compared by the cosine, and cannot be cut to {dimensions}",
            path="dimensions",
            allowed=str(model.dim),
        )
    cut_ND = vectors_ND[:, :dimensions]
    length_N1 = np.linalg.norm(cut_ND, axis=1, keepdims=True)
    return np.asarray(cut_ND / np.maximum(length_N1, np.finfo(np.float32).tiny), dtype=np.float32)


_WithImages = (
    inference_pb2.EmbedImagesRequest
    | inference_pb2.SimilarityRequest
    | inference_pb2.ClassifyRequest
    | inference_pb2.ScorePairsRequest
)


def _sent(request: _WithImages, caller: Caller) -> list[Picture]:
    """The images of a request, wherever their bytes are."""
    if isinstance(request, inference_pb2.ScorePairsRequest):
        return pictures([pair.image for pair in request.pairs], caller.payload)
    return pictures(request.images, caller.payload)


def _bytes(request: _WithImages | inference_pb2.EmbedTextsRequest, caller: Caller) -> int:
    """All that a request brings."""
    return request.ByteSize() + (caller.payload.size_bytes if caller.payload is not None else 0)


async def _given(scores: Scores, vectors: Callable[[Vector], Vector], rows: Rows) -> Vector:
    """Vectors of clients; those of the cosine are there already, and a thread would only cost time."""
    return rows.vectors if scores.given_as_kept else await asyncio.to_thread(vectors, rows.vectors)


async def _both(images: Coroutine[Any, Any, Rows], texts: Coroutine[Any, Any, Rows]) -> tuple[Rows, Rows]:
    """When one is refused, the other is given up, and waited for: until then the request uses its model."""
    try:
        async with asyncio.TaskGroup() as both:
            first, second = both.create_task(images), both.create_task(texts)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return first.result(), second.result()
