"""Bulk embedding over one stream: single items in, groups to the engine, single answers out.

Enters: an iterator of items. Leaves: an iterator of answers, in any order, each with its request's id. Made
by `Router.embed_stream` for each stream. Whatever waits goes out as one group when a lane is free, so a slow
client is answered at once and a fast one in large groups; one that sends faster than it takes answers is not
read meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

import numpy as np

from cliptune.errors import CliptuneError, InternalError, InvalidInputError, to_detail
from cliptune.tensors import pack, unpack
from cliptune.v1 import error_pb2, inference_pb2
from cliptune.v1.inference_pb2 import (
    EmbedImagesRequest,
    EmbedImagesResponse,
    EmbedStreamRequest,
    EmbedStreamResponse,
    EmbedTextsRequest,
    EmbedTextsResponse,
)

_log = logging.getLogger(__name__)

# While the engine forwards one group, the next is decoded and a third is on its way.
_LANES: Final = 3
_GROUP_ITEMS: Final = 64
_GROUP_BYTES: Final = 16 * 1024 * 1024
_WINDOW_ITEMS: Final = 1024
_WINDOW_BYTES: Final = 64 * 1024 * 1024


class BulkStream:
    """One stream. `run` it once."""

    def __init__(
        self,
        embed_images: Callable[[EmbedImagesRequest], Awaitable[EmbedImagesResponse]],
        embed_texts: Callable[[EmbedTextsRequest], Awaitable[EmbedTextsResponse]],
    ) -> None:
        self._embed_images: Final = embed_images
        self._embed_texts: Final = embed_texts
        self._waiting: list[EmbedStreamRequest] = []
        self._answers: list[EmbedStreamResponse] = []
        self._held_items = 0
        self._held_bytes = 0
        """Read, and not yet taken by the client as answers."""
        self._reading = True
        self._busy_lanes = 0
        self._changed: Final = asyncio.Condition()

    async def run(self, requests: AsyncIterator[EmbedStreamRequest]) -> AsyncGenerator[EmbedStreamResponse]:
        """Answers until every request is answered."""
        tasks = [asyncio.create_task(self._read(requests))]
        tasks += [asyncio.create_task(self._work()) for _ in range(_LANES)]
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._answers or self._finished())
                    answers, self._answers = self._answers, []
                if not answers:
                    break
                for answer in answers:
                    yield answer
                    async with self._changed:
                        self._held_items -= 1
                        self._changed.notify_all()
            for task in tasks:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[EmbedStreamRequest]) -> None:
        try:
            async for request in requests:
                async with self._changed:
                    await self._changed.wait_for(
                        lambda: self._held_items < _WINDOW_ITEMS and self._held_bytes < _WINDOW_BYTES
                    )
                    self._held_items += 1
                    self._held_bytes += request.ByteSize()
                    self._waiting.append(request)
                    self._changed.notify_all()
        finally:
            async with self._changed:
                self._reading = False
                self._changed.notify_all()

    async def _work(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._waiting or not self._reading)
                if not self._waiting:
                    return
                group = self._take_group()
                self._busy_lanes += 1
            answers = await self._answer(group)
            async with self._changed:
                # At once: a lane that is free before its answers are there could end the stream without them.
                self._busy_lanes -= 1
                self._held_bytes -= sum(request.ByteSize() for request in group)
                self._answers += answers
                self._changed.notify_all()

    def _take_group(self) -> list[EmbedStreamRequest]:
        """The first that waits, and those after it that can go with it, as many as fit."""
        first = self._waiting[0]
        sizes = itertools.accumulate(request.ByteSize() for request in self._waiting)
        count = 0
        for request, size in zip(self._waiting[:_GROUP_ITEMS], sizes, strict=False):
            same = _group(request) == _group(first)
            if count and (not same or size > _GROUP_BYTES):
                break
            count += 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group

    def _finished(self) -> bool:
        return not self._reading and not self._waiting and not self._busy_lanes

    async def _answer(self, group: Sequence[EmbedStreamRequest]) -> list[EmbedStreamResponse]:
        """One answer for each; an error of the whole call is everyone's."""
        model, kind = group[0].model, group[0].WhichOneof("item")
        response: EmbedImagesResponse | EmbedTextsResponse
        try:
            if kind == "image":
                images = [request.image for request in group]
                response = await self._embed_images(
                    EmbedImagesRequest(model=model, images=images, resolution=group[0].resolution)
                )
            elif kind == "text":
                texts = [request.text for request in group]
                response = await self._embed_texts(EmbedTextsRequest(model=model, texts=texts))
            else:
                raise InvalidInputError("an item of the stream has neither an image nor a text")
            return _spread(group, response)
        except CliptuneError as error:
            detail = to_detail(error)
        except Exception as error:  # a bug of ours: whoever asked is answered all the same
            _log.exception("a group of a bulk stream failed")
            detail = to_detail(InternalError(f"the stream failed on this item: {type(error).__name__}"))
        return [EmbedStreamResponse(id=request.id, model=request.model, error=detail) for request in group]


def _group(request: EmbedStreamRequest) -> tuple[str, str | None, str]:
    """What items of one call have in common: model, kind, size of images."""
    kind = request.WhichOneof("item")
    return request.model, kind, request.resolution if kind == "image" else ""


def _spread(
    group: Sequence[EmbedStreamRequest], response: EmbedImagesResponse | EmbedTextsResponse
) -> list[inference_pb2.EmbedStreamResponse]:
    """Rows to their requests."""
    failed: dict[int, error_pb2.ErrorDetail] = {error.index: error.error for error in response.errors}
    rows = unpack(response.embeddings)
    return [
        EmbedStreamResponse(id=request.id, model=response.model, error=failed[i])
        if i in failed
        else EmbedStreamResponse(
            id=request.id, model=response.model, embedding=pack(np.ascontiguousarray(rows[i]))
        )
        for i, request in enumerate(group)
    ]
