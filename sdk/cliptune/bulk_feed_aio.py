"""Carries a `BulkWindow` over streams of the asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Final

from cliptune.bulk import BulkWindow
from cliptune.errors import UnavailableError
from cliptune.results import Embedded
from cliptune.v1 import inference_pb2

OpenStream = Callable[[AsyncIterator[Any]], Any]
"""Requests → an async generator of answers, which cancels the call when it is closed."""


async def embed_stream(
    window: BulkWindow, items: Iterable[Any] | AsyncIterable[Any], open_stream: OpenStream
) -> AsyncGenerator[Embedded]:
    """Every item's answer, in the order of the input."""
    source = _Source(window, _async(items))
    while not window.done:
        window.opened()
        try:
            async with aclosing(open_stream(source.requests())) as answers:
                async for answer in answers:
                    for embedded in await source.accept(answer):
                        yield embedded
            source.check()
            if not window.done:
                raise window.lost()
        except UnavailableError as error:
            source.check()
            await asyncio.sleep(window.wait_s(error))
    for embedded in window.leaving():
        yield embedded


class _Source:
    """The input and the window, shared by the reader of answers and the writer of requests."""

    def __init__(self, window: BulkWindow, items: AsyncIterator[Any]) -> None:
        self._window: Final = window
        self._items: Final = items
        self._changed: Final = asyncio.Condition()
        # A stream that was lost may still be reading an item when the next one is opened.
        self._reading: Final = asyncio.Lock()
        self._error: Exception | None = None

    async def requests(self) -> AsyncIterator[inference_pb2.EmbedStreamRequest]:
        """The requests of one stream, as gRPC asks for them."""
        window = self._window
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: window.all_sent or window.has_unsent or window.wants_input
                )
                if window.all_sent:
                    return
                request = window.next_request()
            if request is not None:
                yield request
            elif not await self._read():
                return

    async def accept(self, answer: inference_pb2.EmbedStreamResponse) -> list[Embedded]:
        """Take an answer; returns what may leave now."""
        async with self._changed:
            self._window.accept(answer)
            self._changed.notify_all()
            return list(self._window.leaving())

    def check(self) -> None:
        """Raises what went wrong while the input was read."""
        if self._error is not None:
            raise self._error

    async def _read(self) -> bool:
        """Read one item into the window. False when reading failed: the stream is to end.

        Shielded: gRPC cancels it with a lost stream, and the item must not be lost with it.
        """
        return await asyncio.shield(asyncio.ensure_future(self._read_one()))

    async def _read_one(self) -> bool:
        async with self._reading:
            if not self._window.wants_input:
                return True
            try:
                nothing = object()
                item = await anext(self._items, nothing)
                converted = None
                if item is not nothing:
                    converted = await asyncio.to_thread(self._window.convert, item)
                async with self._changed:
                    if item is nothing:
                        self._window.end_input()
                    else:
                        self._window.read(converted)
                    self._changed.notify_all()
            except Exception as error:  # whatever the caller's iterator raises is raised to the caller
                self._error = error
                return False
        return True


async def _async(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
