"""Carries a `BulkWindow` over streams of the synchronous client.

gRPC reads the requests in a thread of its own: files are opened there while the caller works on the answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, Final, Self

from cliptune.bulk import BulkWindow
from cliptune.errors import UnavailableError
from cliptune.results import Embedded
from cliptune.v1 import inference_pb2

OpenStream = Callable[[Iterator[Any]], Any]
"""Requests → a generator of answers, which cancels the call when it is closed."""


def embed_stream(window: BulkWindow, items: Iterable[Any], open_stream: OpenStream) -> Generator[Embedded]:
    """Every item's answer, in the order of the input."""
    source = _Source(window, iter(items))
    while not window.done:
        requests = source.requests()
        try:
            with closing(open_stream(requests)) as answers:
                for answer in answers:
                    yield from source.accept(answer)
            source.check()
            if not window.done:
                raise window.lost()
        except UnavailableError as error:
            requests.close()
            source.check()
            time.sleep(window.wait_s(error))
        finally:
            requests.close()
    yield from window.leaving()


class _Source:
    """The input and the window, shared by the caller's thread and gRPC's."""

    def __init__(self, window: BulkWindow, items: Iterator[Any]) -> None:
        self.window: Final = window
        self.changed: Final = threading.Condition()
        self._items: Final = items
        # A stream that was lost may still be reading an item when the next one is opened.
        self._reading: Final = threading.Lock()
        self._error: Exception | None = None

    def requests(self) -> _Requests:
        """The requests of a new stream."""
        with self.changed:
            self.window.opened()
        return _Requests(self)

    def accept(self, answer: inference_pb2.EmbedStreamResponse) -> list[Embedded]:
        """Take an answer; returns what may leave now."""
        with self.changed:
            self.window.accept(answer)
            self.changed.notify_all()
            return list(self.window.leaving())

    def check(self) -> None:
        """Raises what went wrong while the input was read."""
        if self._error is not None:
            raise self._error

    def read(self) -> bool:
        """Read one item into the window. False when reading failed: the stream is to end."""
        with self._reading:
            with self.changed:
                if not self.window.wants_input:
                    return True
            try:
                nothing = object()
                item = next(self._items, nothing)
                converted = None if item is nothing else self.window.convert(item)
                with self.changed:
                    if item is nothing:
                        self.window.end_input()
                    else:
                        self.window.read(converted)
                    self.changed.notify_all()
            except Exception as error:  # whatever the caller's iterator raises is raised to the caller
                self._error = error
                return False
        return True


class _Requests:
    """The requests of one stream, as gRPC asks for them."""

    def __init__(self, source: _Source) -> None:
        self._source: Final = source
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> inference_pb2.EmbedStreamRequest:
        source, window = self._source, self._source.window
        while True:
            with source.changed:
                source.changed.wait_for(self._something_to_do)
                if self._closed or window.all_sent:
                    raise StopIteration
                request = window.next_request()
                if request is not None:
                    return request
            if not source.read():
                raise StopIteration

    def close(self) -> None:
        """Ends the thread that waits for the next request."""
        with self._source.changed:
            self._closed = True
            self._source.changed.notify_all()

    def _something_to_do(self) -> bool:
        window = self._source.window
        return self._closed or window.all_sent or window.has_unsent or window.wants_input
