"""Sends an inference request to the engine that holds its model.

Enters: public request messages, whose `model` is whatever the caller wrote, and the caller's time. Leaves:
public responses, or errors of `cliptune.errors`. Called by the faces: `rpc/inference.py` and the gateway. The
request is the router's from then on: its `model` is replaced by the key rather than copying the images.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from cliptune.errors import DeadlineExceededError, ModelStateError, RequestTooLargeError
from cliptune.tracing import tracer
from cliptune.v1 import inference_pb2
from cliptune_server.inference.bulk import BulkStream
from cliptune_server.inference.engines import EngineSupervisor
from cliptune_server.inference.pins import Catalog, Pins
from cliptune_server.inference.shadowing import Shadowing
from cliptune_server.inference.traffic import Traffic
from cliptune_server.inference.waiting import Waiting

MESSAGE_BYTES: Final = 256 * 1024 * 1024
# Room for what the model's key adds to a message.
_KEY_BYTES: Final = 4096

_Request = TypeVar("_Request", bound="InferenceRequest")
_Response = TypeVar("_Response", bound="InferenceResponse")

if TYPE_CHECKING:
    from cliptune_server.inference.engine_process import Pick


class InferenceRequest(Protocol):
    """What all requests have."""

    model: str

    def ByteSize(self) -> int:  # noqa: N802
        """Bytes on the wire."""


class InferenceResponse(Protocol):
    """What all responses have."""

    @property
    def profile(self) -> inference_pb2.Profile:
        """Where the time went."""


class Router:
    """Inference as the daemon offers it."""

    def __init__(
        self, engines: EngineSupervisor, catalog: Catalog, *, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        self.traffic: Final = Traffic()
        """The requests under way."""
        self.shadowing: Final = Shadowing()
        """Copies of requests to versions on trial."""
        self._engines: Final = engines
        self._catalog: Final = catalog
        self._waiting: Final = Waiting(catalog)
        self._message_bytes: Final = message_bytes

    async def embed_images(
        self, request: inference_pb2.EmbedImagesRequest, timeout_s: float | None = None, *, bulk: bool = False
    ) -> inference_pb2.EmbedImagesResponse:
        """Unit vectors of images."""
        return await self._forward(
            "EmbedImages", lambda stub: stub.EmbedImages, request, timeout_s, bulk=bulk
        )

    async def embed_texts(
        self, request: inference_pb2.EmbedTextsRequest, timeout_s: float | None = None, *, bulk: bool = False
    ) -> inference_pb2.EmbedTextsResponse:
        """Unit vectors of texts."""
        return await self._forward("EmbedTexts", lambda stub: stub.EmbedTexts, request, timeout_s, bulk=bulk)

    async def similarity(
        self, request: inference_pb2.SimilarityRequest, timeout_s: float | None = None, *, bulk: bool = False
    ) -> inference_pb2.SimilarityResponse:
        """Every image against every text."""
        return await self._forward("Similarity", lambda stub: stub.Similarity, request, timeout_s, bulk=bulk)

    async def score_pairs(
        self, request: inference_pb2.ScorePairsRequest, timeout_s: float | None = None, *, bulk: bool = False
    ) -> inference_pb2.ScorePairsResponse:
        """Image i against text i."""
        return await self._forward("ScorePairs", lambda stub: stub.ScorePairs, request, timeout_s, bulk=bulk)

    async def classify(
        self, request: inference_pb2.ClassifyRequest, timeout_s: float | None = None, *, bulk: bool = False
    ) -> inference_pb2.ClassifyResponse:
        """Zero-shot classes of images."""
        return await self._forward("Classify", lambda stub: stub.Classify, request, timeout_s, bulk=bulk)

    async def embed_stream(
        self, requests: AsyncIterator[inference_pb2.EmbedStreamRequest], *, bulk: bool = True
    ) -> AsyncGenerator[inference_pb2.EmbedStreamResponse]:
        """Bulk embedding: answers as they come; each request is answered, with an error at worst.

        Whatever is interactive goes before it, unless `bulk` says that this is interactive too.

        One reference means one version to the stream's end; where an alias moves, the version that it left
        stays in the engine so long.
        """
        pins = Pins(self._catalog)

        async def embed_images(
            request: inference_pb2.EmbedImagesRequest,
        ) -> inference_pb2.EmbedImagesResponse:
            return await self._forward(
                "EmbedImages", lambda stub: stub.EmbedImages, request, None, pins, bulk=bulk
            )

        async def embed_texts(request: inference_pb2.EmbedTextsRequest) -> inference_pb2.EmbedTextsResponse:
            return await self._forward(
                "EmbedTexts", lambda stub: stub.EmbedTexts, request, None, pins, bulk=bulk
            )

        try:
            async with aclosing(BulkStream(embed_images, embed_texts).run(requests)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            pins.close()

    async def _forward(
        self,
        name: str,
        pick: Pick[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
        pins: Pins | None = None,
        *,
        bulk: bool = False,
    ) -> _Response:
        size, limit = request.ByteSize(), self._message_bytes - _KEY_BYTES
        if size > limit:
            raise RequestTooLargeError(
                f"the request has {size:,} bytes; at most {limit:,} are taken: send fewer items at a time",
                limit=limit,
            )
        began_s = time.monotonic()
        deadline_s = None if timeout_s is None else began_s + timeout_s
        reference = request.model
        with self.traffic.request(), tracer().start_as_current_span(f"router.{name}", record_exception=False):
            request.model = await self._waiting.resolve(pins or self._catalog, reference, deadline_s)
            try:
                answer = await self._engines.call(pick, request, _left_s(deadline_s), bulk=bulk)
            except ModelStateError:
                # It was unloaded in between, as when an alias moves: the reference may mean another one now.
                key = await self._waiting.resolve(pins or self._catalog, reference, deadline_s)
                if key == request.model:
                    raise
                request.model = key
                answer = await self._engines.call(pick, request, _left_s(deadline_s), bulk=bulk)
        answer.profile.daemon_seconds = time.monotonic() - began_s
        shadow = None if pins else self._catalog.shadow(reference)
        if shadow is not None and shadow != request.model:
            self._shadow(shadow, pick, request, timeout_s)
        return answer

    def _shadow(
        self, key: str, pick: Pick[_Request, _Response], request: _Request, timeout_s: float | None
    ) -> None:
        async def ask() -> object:
            request.model = key  # answered: nobody else looks at it any more
            return await self._engines.call(pick, request, timeout_s, bulk=True)

        self.shadowing.send(key, ask)


def _left_s(deadline_s: float | None) -> float | None:
    if deadline_s is None:
        return None
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceededError("the time that the caller gave was over before the engine was asked")
    return left_s
