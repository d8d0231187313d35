"""Bulk embedding: what is in flight, what comes next, in which order answers leave.

Pure: items go in as they are read, answers come in any order, and leave in the order of the input. The number
of items between the oldest unanswered one and the newest sent one is bounded, so memory is too, however long
the input is. After a lost stream everything unanswered is sent again. `bulk_feed.py` and `bulk_feed_aio.py`
carry the stream and do the waiting.

Until the first answer one item alone is in flight: it tells which version of the model answers, and the
others ask for that version, so that the swap of an alias cannot mix two models' vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from cliptune.channel import Patience
from cliptune.errors import CliptuneError, InvalidInputError, UnavailableError, from_detail
from cliptune.images import image_message
from cliptune.inference_codec import Resolution, resolution_text
from cliptune.items import OnError, placed, text_item
from cliptune.results import Embedded, Embeddings, FailedItem, Float32
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2

METHOD: Final = "InferenceService/EmbedStream"
Kind: TypeAlias = Literal["images", "texts"]
DEFAULT_IN_FLIGHT: Final = 64
# An engine that died is back within ten seconds.
_RECONNECT_S: Final = 30.0


class Collected:
    """The answers of a whole bulk embedding, made into one array."""

    def __init__(self, kind: Kind) -> None:
        self._kind: Final = kind
        self._rows: list[Float32 | None] = []
        self._failed: list[FailedItem] = []
        self._model = ""

    def add(self, answer: Embedded) -> None:
        """The next one, in order."""
        self._rows.append(answer.vector)
        self._model = self._model or answer.model
        if answer.error is not None:
            self._failed.append(FailedItem(field=self._kind, index=answer.index, error=answer.error))

    def embeddings(self) -> Embeddings:
        """[N, D]; rows of failed items are NaN. When none was answered, the first error is raised."""
        example = next((row for row in self._rows if row is not None), None)
        if example is None:
            if self._failed:
                raise placed(self._failed[0], count=len(self._failed), total=len(self._rows))
            raise InvalidInputError(f"{self._kind} is empty", field=self._kind)
        missing = np.full_like(example, np.nan)
        vectors = np.stack([missing if row is None else row for row in self._rows])
        return Embeddings.of(vectors, model=self._model, errors=tuple(self._failed))


class BulkWindow:
    """The items between input and output of one bulk embedding."""

    def __init__(
        self, kind: Kind, model: str, max_in_flight: int, on_error: OnError, resolution: Resolution = ""
    ) -> None:
        self._kind: Final = kind
        self._model = model
        self._resolution: Final = resolution_text(resolution)
        self._pinned = False
        self._max_in_flight: Final = max(1, max_in_flight)
        self._on_error: Final = on_error
        self._patience = Patience(limit_s=_RECONNECT_S)
        self._next_in = 0
        self._next_out = 0
        self._input_ended = False
        # Unanswered ones by place, in order; those of them that still have to be sent.
        self._unanswered: dict[int, Any] = {}
        self._unsent: deque[int] = deque()
        # Answered ones that wait for an earlier one, and those whose turn it is.
        self._answered: dict[int, Embedded] = {}
        self._leaving: deque[Embedded] = deque()

    @property
    def wants_input(self) -> bool:
        """Whether an item may be read now."""
        room = self._max_in_flight if self._pinned else 1
        return not self._input_ended and self._next_in - self._next_out < room

    @property
    def done(self) -> bool:
        """Whether every item was answered."""
        return self._input_ended and self._next_out == self._next_in

    @property
    def has_unsent(self) -> bool:
        """Whether `next_request` has one."""
        return bool(self._unsent)

    @property
    def all_sent(self) -> bool:
        """Whether the stream of requests may be closed."""
        return self._input_ended and not self._unsent

    def convert(self, item: Any) -> Any:
        """The item as a message, or the error that keeps it from being sent. A path is read here."""
        try:
            return image_message(item) if self._kind == "images" else text_item(item)
        except CliptuneError as error:
            return error

    def read(self, converted: Any) -> None:
        """Take the next item of the input, as `convert` made it; an error is answered here."""
        index = self._next_in
        self._next_in += 1
        if isinstance(converted, CliptuneError):
            self._settle(self._refused(index, converted))
        else:
            self._unanswered[index] = converted
            self._unsent.append(index)

    def end_input(self) -> None:
        """There are no more items."""
        self._input_ended = True

    def next_request(self) -> inference_pb2.EmbedStreamRequest | None:
        """What to send now, if anything."""
        if not self._unsent:
            return None
        index = self._unsent.popleft()
        request = inference_pb2.EmbedStreamRequest(id=str(index), model=self._model)
        if self._kind == "images":
            request.resolution = self._resolution
            request.image.CopyFrom(self._unanswered[index])
        else:
            request.text = self._unanswered[index]
        return request

    def accept(self, answer: inference_pb2.EmbedStreamResponse) -> None:
        """Take an answer. `UnavailableError` when the engine was away: what is unanswered is to be resent."""
        index = int(answer.id)
        if index not in self._unanswered:  # answered before the stream was lost
            return
        if answer.WhichOneof("result") == "error":
            error = from_detail(answer.error)
            if isinstance(error, UnavailableError):
                raise error
            settled = self._refused(index, error)
        else:
            vector = np.array(unpack(answer.embedding), dtype=np.float32)
            settled = Embedded(index=index, vector=vector, model=answer.model)
            if answer.model:
                self._model, self._pinned = answer.model, True
        del self._unanswered[index]
        self._patience.heard()
        self._settle(settled)

    def leaving(self) -> Iterator[Embedded]:
        """Answers whose turn it is."""
        while self._leaving:
            yield self._leaving.popleft()

    def lost(self) -> UnavailableError:
        """The error of a stream that ended before everything was answered."""
        return UnavailableError(f"the daemon ended the stream with {len(self._unanswered)} items unanswered")

    def opened(self) -> None:
        """A stream was opened: whatever is unanswered goes out (again)."""
        self._unsent = deque(sorted(self._unanswered))
        self._patience.opened()

    def wait_s(self, error: UnavailableError) -> float:
        """How long to wait before the stream is opened again; raises `error` after too long an absence."""
        return self._patience.wait_s(error)

    def _settle(self, answer: Embedded) -> None:
        self._answered[answer.index] = answer
        while self._next_out in self._answered:
            self._leaving.append(self._answered.pop(self._next_out))
            self._next_out += 1

    def _refused(self, index: int, error: CliptuneError) -> Embedded:
        if self._on_error == "raise":
            item = FailedItem(field=self._kind, index=index, error=error)
            raise placed(item, count=1, total=0) from error
        return Embedded(index=index, vector=None, error=error)
