"""InferenceService over gRPC: a thin face of `Router`. Errors leave as exceptions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from cliptune import priority
from cliptune.v1 import inference_pb2, inference_pb2_grpc
from cliptune_server.inference.router import Router

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Each method hands its message and the caller's remaining time to the router."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def EmbedImages(  # noqa: N802, D102
        self, request: inference_pb2.EmbedImagesRequest, context: _Context
    ) -> inference_pb2.EmbedImagesResponse:
        return await self._router.embed_images(request, context.time_remaining(), bulk=_bulk(context))

    async def EmbedTexts(  # noqa: N802, D102
        self, request: inference_pb2.EmbedTextsRequest, context: _Context
    ) -> inference_pb2.EmbedTextsResponse:
        return await self._router.embed_texts(request, context.time_remaining(), bulk=_bulk(context))

    async def Similarity(  # noqa: N802, D102
        self, request: inference_pb2.SimilarityRequest, context: _Context
    ) -> inference_pb2.SimilarityResponse:
        return await self._router.similarity(request, context.time_remaining(), bulk=_bulk(context))

    async def ScorePairs(  # noqa: N802, D102
        self, request: inference_pb2.ScorePairsRequest, context: _Context
    ) -> inference_pb2.ScorePairsResponse:
        return await self._router.score_pairs(request, context.time_remaining(), bulk=_bulk(context))

    async def Classify(  # noqa: N802, D102
        self, request: inference_pb2.ClassifyRequest, context: _Context
    ) -> inference_pb2.ClassifyResponse:
        return await self._router.classify(request, context.time_remaining(), bulk=_bulk(context))

    async def EmbedStream(  # noqa: N802, D102
        self, request_iterator: AsyncIterator[inference_pb2.EmbedStreamRequest], context: _Context
    ) -> AsyncIterator[inference_pb2.EmbedStreamResponse]:
        async with aclosing(
            self._router.embed_stream(request_iterator, bulk=_bulk(context, otherwise=True))
        ) as answers:
            async for answer in answers:
                yield answer


def _bulk(context: _Context, *, otherwise: bool = False) -> bool:
    return priority.is_bulk(context.invocation_metadata(), otherwise=otherwise)
