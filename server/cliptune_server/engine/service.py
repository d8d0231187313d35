"""EngineService: the engine's gRPC face, thin over `Inference` and `ModelSet`.

Enters: messages of the daemon. Leaves: their answers; errors as a status with `google.rpc.ErrorInfo`.
`Status` answers from the event loop alone, so that it tells a busy engine from a stuck one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import grpc
from opentelemetry import trace

from cliptune import priority, tracing
from cliptune.errors import CliptuneError, InternalError, wire_status
from cliptune.internal.v1 import engine_pb2, engine_pb2_grpc
from cliptune.v1 import inference_pb2
from cliptune.wire import DETAILS_KEY, status_details, status_message
from cliptune_model.machine.device import device_memory_bytes
from cliptune_server.engine.admission import Admission
from cliptune_server.engine.batcher import Batcher
from cliptune_server.engine.cache import EmbeddingCache
from cliptune_server.engine.decode import Decoder
from cliptune_server.engine.inference import Inference
from cliptune_server.engine.models import ModelSet
from cliptune_server.engine.payload import Payload
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.spans import Caller

_log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
# Asked every second; a trace of them would bury the others.
_UNTRACED: Final = ("Status", "Canary")


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """Methods of the engine."""

    def __init__(
        self,
        *,
        inference: Inference,
        models: ModelSet,
        batcher: Batcher,
        progress: Progress,
        decoder: Decoder,
        admission: Admission,
        cache: EmbeddingCache,
    ) -> None:
        self._inference: Final = inference
        self._models: Final = models
        self._batcher: Final = batcher
        self._progress: Final = progress
        self._decoder: Final = decoder
        self._admission: Final = admission
        self._cache: Final = cache

    async def EmbedImages(  # noqa: N802, D102
        self, request: inference_pb2.EmbedImagesRequest, context: _Context
    ) -> inference_pb2.EmbedImagesResponse:
        return await self._inference.embed_images(request, _caller(context))

    async def EmbedTexts(  # noqa: N802, D102
        self, request: inference_pb2.EmbedTextsRequest, context: _Context
    ) -> inference_pb2.EmbedTextsResponse:
        return await self._inference.embed_texts(request, _caller(context))

    async def Similarity(  # noqa: N802, D102
        self, request: inference_pb2.SimilarityRequest, context: _Context
    ) -> inference_pb2.SimilarityResponse:
        return await self._inference.similarity(request, _caller(context))

    async def ScorePairs(  # noqa: N802, D102
        self, request: inference_pb2.ScorePairsRequest, context: _Context
    ) -> inference_pb2.ScorePairsResponse:
        return await self._inference.score_pairs(request, _caller(context))

    async def Classify(  # noqa: N802, D102
        self, request: inference_pb2.ClassifyRequest, context: _Context
    ) -> inference_pb2.ClassifyResponse:
        return await self._inference.classify(request, _caller(context))

    async def Load(  # noqa: N802, D102
        self, request: engine_pb2.LoadRequest, context: _Context
    ) -> engine_pb2.LoadResponse:
        # Goes on when its caller does not wait for it: half a load cannot be taken back.
        load = asyncio.ensure_future(self._models.load(request.key, request.path))
        model = await asyncio.shield(load)
        return engine_pb2.LoadResponse(model=model.describe())

    async def Unload(  # noqa: N802, D102
        self, request: engine_pb2.UnloadRequest, context: _Context
    ) -> engine_pb2.UnloadResponse:
        await asyncio.shield(asyncio.ensure_future(self._models.unload(request.key)))
        return engine_pb2.UnloadResponse()

    async def Canary(  # noqa: N802, D102
        self, request: engine_pb2.CanaryRequest, context: _Context
    ) -> engine_pb2.CanaryResponse:
        return engine_pb2.CanaryResponse(seconds=await self._models.canary())

    async def Status(  # noqa: N802, D102
        self, request: engine_pb2.StatusRequest, context: _Context
    ) -> engine_pb2.StatusResponse:
        running = self._progress.worst()
        return engine_pb2.StatusResponse(
            device=self._models.device,
            models=self._models.describe(),
            queues=[
                engine_pb2.QueueStatus(
                    model=lane.model,
                    tower=lane.tower,
                    waiting_items=len(lane) + lane.running,
                    batches=lane.batches,
                    items=lane.items,
                    forward_seconds=lane.forward_s,
                    oldest_seconds=lane.oldest_s,
                    positions=lane.positions,
                    padding=lane.padding,
                    expired_items=lane.expired,
                    batch_sizes=lane.sizes,
                )
                for lane in self._batcher.lanes
            ],
            running_seconds=running.age_s,
            stall_limit_seconds=running.limit_s,
            resident_bytes=device_memory_bytes("cpu"),
            decode_seconds=self._decoder.seconds,
            decoded_items=self._decoder.items,
            shed_requests=self._admission.shed,
            cache=engine_pb2.CacheStatus(
                hits=self._cache.hits, misses=self._cache.misses, bytes=self._cache.bytes
            ),
        )


class Border(grpc.aio.ServerInterceptor):
    """Around every call: continues the caller's trace, and tells errors by their class."""

    async def intercept_service(  # noqa: D102
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        name = handler_call_details.method.rpartition("/")[2]
        answer = cast("Callable[[Any, _Context], Awaitable[Any]]", handler.unary_unary)

        async def answer_or_tell(request: Any, context: _Context) -> Any:
            try:
                if name in _UNTRACED:
                    return await answer(request, context)
                parent = tracing.extract(context.invocation_metadata())
                with tracing.tracer().start_as_current_span(
                    f"engine.{name}", context=parent, kind=trace.SpanKind.SERVER
                ):
                    return await answer(request, context)
            except CliptuneError as error:
                await _tell(context, error)
            except Exception as error:
                _log.exception("%s failed", name)
                await _tell(context, InternalError(f"the engine failed: {type(error).__name__}: {error}"))

        return grpc.unary_unary_rpc_method_handler(
            answer_or_tell,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _caller(context: _Context) -> Caller:
    metadata = context.invocation_metadata()
    return Caller.current(
        context.time_remaining(), bulk=priority.is_bulk(metadata), payload=Payload.told(metadata)
    )


async def _tell(context: _Context, error: CliptuneError) -> None:
    await context.abort(
        wire_status(error).grpc, status_message(error), ((DETAILS_KEY, status_details(error)),)
    )
