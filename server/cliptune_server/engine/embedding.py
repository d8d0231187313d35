"""Items of a request to their vectors: remembered ones at once, the others through decoder and batcher.

Enters: images, texts or classes, and who asks. Leaves: `Rows`, each item's vector or its error. Called by
`inference.py`. A request that cannot be answered in its time is refused before anything of it is decoded.

Shape suffixes: D embedding, P prompts, L tokens, C channels, H height, W width.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from opentelemetry import trace

from cliptune.errors import CliptuneError, DeadlineExceededError, InvalidInputError
from cliptune_server.engine.admission import Admission
from cliptune_server.engine.backlog import Stage
from cliptune_server.engine.batcher import Batcher, Lane
from cliptune_server.engine.cache import EmbeddingCache, image_digests, text_digests
from cliptune_server.engine.decode import Decoder
from cliptune_server.engine.expectation import Expectation, Part
from cliptune_server.engine.models import ServedModel
from cliptune_server.engine.payload import Picture
from cliptune_server.engine.rows import Rows
from cliptune_server.engine.spans import Caller, decode_span

# Prompts of one request that are in the engine's queues together.
PROMPTS_AT_A_TIME: Final = 1024
# Hashed on the event loop in less than a tenth of a millisecond.
_HASHED_AT_ONCE_BYTES: Final = 64 * 1024

Vector = npt.NDArray[np.float32]


class Embedder:
    """One engine's."""

    def __init__(
        self,
        *,
        batcher: Batcher,
        decoder: Decoder,
        admission: Admission,
        expectation: Expectation,
        cache: EmbeddingCache,
    ) -> None:
        self._batcher: Final = batcher
        self._decoder: Final = decoder
        self._admission: Final = admission
        self._expectation: Final = expectation
        self._cache: Final = cache

    async def images(
        self, model: ServedModel, images: Sequence[Picture], caller: Caller, resolution: str
    ) -> Rows:
        """[N, D] features of N images, brought to the size that `resolution` means."""
        size = model.sizes.asked(resolution)
        if not images:
            return Rows.of([], model.dim)
        digests = await _digests(image_digests, images) if self._cache.on else []
        digests = [digest + size.mark for digest in digests]
        outcomes, unknown = self._remembered(model.images, digests, len(images), caller)
        self._check_time(len(unknown), self._decoder.image_stage, model.images, caller)
        left_to_decode = len(unknown)
        began_s = time.perf_counter()
        span = decode_span(caller, "image", len(unknown)) if unknown else trace.INVALID_SPAN

        async def embed(place: int) -> Vector:
            nonlocal left_to_decode
            try:
                async with model.decoded_ahead[caller.bulk]:
                    try:
                        if caller.late():
                            raise DeadlineExceededError("the deadline was over before the image was decoded")
                        image_CHW = await self._decoder.image(size.reader, images[place], bulk=caller.bulk)
                    finally:
                        decoded()
                        left_to_decode -= 1
                        if not left_to_decode:
                            caller.timings.decode_s = max(
                                caller.timings.decode_s, time.perf_counter() - began_s
                            )
                            span.end()
                    return await self._batcher.submit(
                        model.images, image_CHW, caller, shape=image_CHW.shape, length=size.positions
                    )
            finally:
                answered()

        try:
            with (
                self._decoder.image_stage.backlog.expecting(len(unknown), bulk=caller.bulk) as decoded,
                model.images.backlog.expecting(len(unknown), bulk=caller.bulk) as answered,
            ):
                found = await asyncio.gather(*map(embed, unknown), return_exceptions=True)
        finally:
            if left_to_decode:  # cancelled
                span.end()
        self._settle(model.images, outcomes, unknown, found, digests)
        return Rows.of(outcomes, model.dim)

    async def texts(self, model: ServedModel, texts: Sequence[str], caller: Caller) -> Rows:
        """[N, D] features of N texts."""
        if not texts:
            return Rows.of([], model.dim)
        digests = await _digests(text_digests, texts) if self._cache.on else []
        outcomes, unknown = self._remembered(model.texts, digests, len(texts), caller)
        self._check_time(len(unknown), self._decoder.text_stage, model.texts, caller)
        began_s = time.perf_counter()
        with (
            self._decoder.text_stage.backlog.expecting(len(texts), bulk=caller.bulk) as tokenised,
            model.texts.backlog.expecting(len(unknown), bulk=caller.bulk) as answered,
        ):
            with trace.use_span(decode_span(caller, "text", len(texts)), end_on_exit=True):
                decoded = await self._decoder.texts(model.clip, texts, tokenised)
            caller.timings.decode_s = max(caller.timings.decode_s, time.perf_counter() - began_s)
            tokens = sum(
                model.clip.count_tokens(tokens_L)
                for tokens_L in decoded
                if not isinstance(tokens_L, CliptuneError)
            )
            submitted: list[tuple[int, asyncio.Future[Vector]]] = []
            for place, tokens_L in enumerate(decoded):
                if isinstance(tokens_L, CliptuneError):
                    outcomes[place] = tokens_L
            for place in unknown:
                if isinstance(tokens_L := decoded[place], CliptuneError):
                    continue
                answer = self._batcher.submit(model.texts, tokens_L, caller, length=len(tokens_L))
                answer.add_done_callback(lambda _: answered())
                submitted.append((place, answer))
            found = await asyncio.gather(*(answer for _, answer in submitted), return_exceptions=True)
        self._settle(model.texts, outcomes, [place for place, _ in submitted], found, digests)
        return Rows.of(outcomes, model.dim, tokens=tokens)

    async def classes(self, model: ServedModel, classes: Sequence[Sequence[str]], caller: Caller) -> Rows:
        """One text's features a class, as the model's similarity makes them of its prompts'."""
        outcomes: list[Vector | BaseException | None] = [model.class_vectors.get(one) for one in classes]
        unknown = [place for place, outcome in enumerate(outcomes) if outcome is None]
        prompts = [prompt for place in unknown for prompt in classes[place]]
        parts = [
            await self.texts(model, prompts[start : start + PROMPTS_AT_A_TIME], caller)
            for start in range(0, len(prompts), PROMPTS_AT_A_TIME)
        ]
        vectors_PD = (
            np.concatenate([part.vectors for part in parts])
            if parts
            else np.zeros((0, model.dim), np.float32)
        )
        errors = {
            number * PROMPTS_AT_A_TIME + place: error
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

    def _check_time(self, items: int, stage: Stage, lane: Lane, caller: Caller) -> None:
        """`OverloadedError` when these items cannot be embedded in the caller's time, as far as is known."""
        if items and caller.deadline_s is not None:
            expected = self._expectation.of([Part(items=items, stage=stage, lane=lane)], bulk=caller.bulk)
            self._admission.check_time(expected, caller.deadline_s - time.monotonic())

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


_Hashed = TypeVar("_Hashed", str, Picture)


async def _digests(
    digest: Callable[[Sequence[_Hashed]], list[bytes]], items: Sequence[_Hashed]
) -> list[bytes]:
    """Beside the event loop, where that is worth a thread."""
    size = sum(len(item) if isinstance(item, str) else len(item.data) for item in items)
    return digest(items) if size < _HASHED_AT_ONCE_BYTES else await asyncio.to_thread(digest, items)
