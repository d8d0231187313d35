"""The bulk stream by itself: whatever happens to a group, each of its items is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cliptune.errors import InternalError, from_detail
from cliptune.v1 import inference_pb2
from cliptune_server.inference.bulk import BulkStream


async def test_items_are_answered_when_the_engine_answers_what_cannot_be_read() -> None:
    answered = asyncio.Event()

    async def embed_images(
        request: inference_pb2.EmbedImagesRequest,
    ) -> inference_pb2.EmbedImagesResponse:
        return inference_pb2.EmbedImagesResponse(model=request.model)

    async def embed_texts(request: inference_pb2.EmbedTextsRequest) -> inference_pb2.EmbedTextsResponse:
        raise ValueError("what nobody foresaw")

    async def requests() -> AsyncIterator[inference_pb2.EmbedStreamRequest]:
        yield inference_pb2.EmbedStreamRequest(id="first", text="a circle")
        await answered.wait()  # a client that sends the next one when it has the answer
        yield inference_pb2.EmbedStreamRequest(id="second", text="a square")

    answers = []
    async with asyncio.timeout(10):
        async for answer in BulkStream(embed_images, embed_texts).run(requests()):
            answers.append(answer)
            answered.set()
    assert [answer.id for answer in answers] == ["first", "second"]
    assert all(isinstance(from_detail(answer.error), InternalError) for answer in answers)
