"""What the engine is asked for: embeddings, and what follows from them.

Enters: public request messages whose `model` is a loaded key. Leaves: public responses. Called by the
servicer. Each item goes through decode and batcher by itself; the answers are put together here.

Shape suffixes: N images or pairs, M texts, C classes, D embedding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from opentelemetry import trace

from cliptune.errors import CliptuneError, DeadlineExceededError, InvalidInputError
from cliptune.tensors import pack
from cliptune.v1 import inference_pb2, tensor_pb2
from cliptune_server.engine.admission import Admission
from cliptune_server.engine.batcher import Batcher, Lane
from cliptune_server.engine.cache import EmbeddingCache, image_digests, text_digests
from cliptune_server.engine.classes import (
    MIN_CLASSES,
    check_judged_together,
    check_labels,
    prompts_of,
    softmax,
)
from cliptune_server.engine.decode import Decoder
from cliptune_server.engine.models import ModelSet, ServedModel
from cliptune_server.engine.rows import Rows, item_errors, raise_single
from cliptune_server.engine.scores import Scores
from cliptune_server.engine.spans import Caller, decode_span

# Prompts of one request that are in the engine's queues together.
_PROMPTS_AT_A_TIME: Final = 1024
# Hashed on the event loop in less than a tenth of a millisecond.
_HASHED_AT_ONCE_BYTES: Final = 64 * 1024

Vector = npt.NDArray[np.float32]


class Inference:
    """Requests in, responses out, over one `ModelSet`."""

    def __init__(
        self,
        *,
        models: ModelSet,
        batcher: Batcher,
        decoder: Decoder,
        admission: Admission,
        cache: EmbeddingCache,
    ) -> None:
        self._models: Final = models
        self._cache: Final = cache
        self._batcher: Final = batcher
        self._decoder: Final = decoder
        self._admission: Final = admission

    async def embed_images(
        self, request: inference_pb2.EmbedImagesRequest, caller: Caller
    ) -> inference_pb2.EmbedImagesResponse:
        """Vectors of images, as the model's similarity gives them to clients."""
        self._admission.check_count("images", len(request.images))
        with (
            self._models.use(request.model) as model,
            self._room(len(request.images), request.ByteSize(), caller),
        ):
            rows = await self._embed_images(model, request.images, caller, request.resolution)
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
            self._room(len(request.texts), request.ByteSize(), caller),
        ):
            rows = await self._embed_texts(model, request.texts, caller)
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
            self._room(count, request.ByteSize(), caller),
        ):
            images, texts = await _both(
                self._embed_images(model, request.images, caller, request.resolution),
                self._embed_texts(model, request.texts, caller),
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
            self._room(2 * len(request.pairs), request.ByteSize(), caller),
        ):
            images, texts = await _both(
                self._embed_images(model, [pair.image for pair in request.pairs], caller, request.resolution),
                self._embed_texts(model, [pair.text for pair in request.pairs], caller),
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
        count = len(request.images) + min(prompts, _PROMPTS_AT_A_TIME)
        with (
            self._models.use(request.model) as model,
            self._room(count, request.ByteSize(), caller),
        ):
            images, texts = await _both(
                self._embed_images(model, request.images, caller, request.resolution),
                self._embed_classes(model, [prompts for _, prompts in classes], caller),
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

    @contextmanager
    def _room(self, items: int, size_bytes: int, caller: Caller) -> Iterator[None]:
        """Room for a request that can be answered in its time, as far as that is known."""
        wait_s = self._batcher.backlog_s(interactive=not caller.bulk)
        left_s = None if caller.deadline_s is None else caller.deadline_s - time.monotonic()
        self._admission.check_time(wait_s, left_s)
        with self._admission.room(items, size_bytes, bulk=caller.bulk):
            yield

    async def _embed_images(
        self, model: ServedModel, images: Sequence[tensor_pb2.Image], caller: Caller, resolution: str
    ) -> Rows:
        size = model.sizes.asked(resolution)
        if not images:
            return Rows.of([], model.dim)
        digests = await _digests(image_digests, images) if self._cache.on else []
        digests = [digest + size.mark for digest in digests]
        outcomes, unknown = self._remembered(model.images, digests, len(images), caller)
        left_to_decode = len(unknown)
        began_s = time.perf_counter()
        span = decode_span(caller, "image", len(unknown)) if unknown else trace.INVALID_SPAN

        async def embed(place: int) -> Vector:
            nonlocal left_to_decode
            async with model.decoded_ahead[caller.bulk]:
                try:
                    if caller.late():
                        raise DeadlineExceededError("the deadline was over before the image was decoded")
                    image_CHW = await self._decoder.image(size.reader, images[place], bulk=caller.bulk)
                finally:
                    left_to_decode -= 1
                    if not left_to_decode:
                        caller.timings.decode_s = max(caller.timings.decode_s, time.perf_counter() - began_s)
                        span.end()
                return await self._batcher.submit(
                    model.images, image_CHW, caller, shape=image_CHW.shape, length=size.positions
                )

        try:
            with self._batcher.pending(model.images, len(unknown), caller):
                found = await asyncio.gather(*map(embed, unknown), return_exceptions=True)
        finally:
            if left_to_decode:  # cancelled
                span.end()
        self._settle(model.images, outcomes, unknown, found, digests)
        return Rows.of(outcomes, model.dim)

    async def _embed_texts(self, model: ServedModel, texts: Sequence[str], caller: Caller) -> Rows:
        if not texts:
            return Rows.of([], model.dim)
        began_s = time.perf_counter()
        with trace.use_span(decode_span(caller, "text", len(texts)), end_on_exit=True):
            decoded = await self._decoder.texts(model.clip, texts)
        caller.timings.decode_s = max(caller.timings.decode_s, time.perf_counter() - began_s)
        tokens = sum(
            model.clip.count_tokens(tokens_L)
            for tokens_L in decoded
            if not isinstance(tokens_L, CliptuneError)
        )
        digests = await _digests(text_digests, texts) if self._cache.on else []
        outcomes, unknown = self._remembered(model.texts, digests, len(texts), caller)
        for place, tokens_L in enumerate(decoded):
            if isinstance(tokens_L, CliptuneError):
                outcomes[place] = tokens_L
        submitted = [
            (place, self._batcher.submit(model.texts, tokens_L, caller, length=len(tokens_L)))
            for place in unknown
            if not isinstance(tokens_L := decoded[place], CliptuneError)
        ]
        with self._batcher.pending(model.texts, len(submitted), caller):
            found = await asyncio.gather(*(answer for _, answer in submitted), return_exceptions=True)
        self._settle(model.texts, outcomes, [place for place, _ in submitted], found, digests)
        return Rows.of(outcomes, model.dim, tokens=tokens)

    def _remembered(
        self, lane: Lane, digests: Sequence[bytes], count: int, caller: Caller
    ) -> tuple[list[Vector | BaseException], list[int]]:
        """An outcome for each item, and the places of those that the cache does not know."""
        outcomes: list[Vector | BaseException] = [InvalidInputError("not embedded")] * count
        unknown = []
        for place in range(count):
            row_D = self._cache.get((lane.model, lane.tower), digests[place]) if digests else None
            if row_D is None:
                unknown.append(place)
            else:
                outcomes[place] = row_D
        caller.timings.cached_items += count - len(unknown)
        return outcomes, unknown

    def _settle(
        self,
        lane: Lane,
        outcomes: list[Vector | BaseException],
        places: Sequence[int],
        found: Sequence[Vector | BaseException],
        digests: Sequence[bytes],
    ) -> None:
        """Puts what was found in its places, and remembers it."""
        for place, row in zip(places, found, strict=True):
            outcomes[place] = row
            if digests and not isinstance(row, BaseException):
                self._cache.put((lane.model, lane.tower), digests[place], row)

    async def _embed_classes(
        self, model: ServedModel, classes: Sequence[Sequence[str]], caller: Caller
    ) -> Rows:
        """One text's features a class, as the model's similarity makes them of its prompts'."""
        outcomes: list[Vector | BaseException | None] = [model.class_vectors.get(one) for one in classes]
        unknown = [place for place, outcome in enumerate(outcomes) if outcome is None]
        prompts = [prompt for place in unknown for prompt in classes[place]]
        parts = [
            await self._embed_texts(model, prompts[start : start + _PROMPTS_AT_A_TIME], caller)
            for start in range(0, len(prompts), _PROMPTS_AT_A_TIME)
        ]
        vectors_PD = (
            np.concatenate([part.vectors for part in parts])
            if parts
            else np.zeros((0, model.dim), np.float32)
        )
        errors = {
            number * _PROMPTS_AT_A_TIME + place: error
            for number, part in enumerate(parts)
            for place, error in part.errors.items()
        }
        start = 0
        for place in unknown:
            end = start + len(classes[place])
            failed = [errors[number] for number in range(start, end) if number in errors]
            if failed:
                outcomes[place] = failed[0]
            else:
                vector_D = model.scores.ensemble(vectors_PD[start:end])
                model.class_vectors.put(classes[place], vector_D)
                outcomes[place] = vector_D
            start = end
        return Rows.of([outcome for outcome in outcomes if outcome is not None], model.dim)


_Hashed = TypeVar("_Hashed", str, tensor_pb2.Image)


async def _digests(
    digest: Callable[[Sequence[_Hashed]], list[bytes]], items: Sequence[_Hashed]
) -> list[bytes]:
    """Beside the event loop, where that is worth a thread."""
    size = sum(len(item) if isinstance(item, str) else item.ByteSize() for item in items)
    return digest(items) if size < _HASHED_AT_ONCE_BYTES else await asyncio.to_thread(digest, items)


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


async def _given(scores: Scores, vectors: Callable[[Vector], Vector], rows: Rows) -> Vector:
    """Vectors of clients; those of the cosine are there already, and a thread would only cost time."""
    return rows.vectors if scores.given_as_kept else await asyncio.to_thread(vectors, rows.vectors)


async def _both(images: Awaitable[Rows], texts: Awaitable[Rows]) -> tuple[Rows, Rows]:
    """Waits for both also when one fails: until then the request uses its model."""
    first, second = await asyncio.gather(images, texts, return_exceptions=True)
    if isinstance(first, BaseException):
        raise first
    if isinstance(second, BaseException):
        raise second
    return first, second
