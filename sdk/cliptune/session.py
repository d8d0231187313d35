"""One stream that watches and controls many jobs: its bookkeeping, and its synchronous form.

`SessionBook` is pure and shared with `session_aio.py`: it numbers requests, brings each answer to who waits
for it, and knows when nothing is watched any more. A session does not outlive its connection: after an
`UnavailableError` the caller opens a new one from its last event numbers (`watch_job` does that by itself).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, Self

import cliptune.codec as codec
from cliptune.errors import CancelledError, CliptuneError, from_detail
from cliptune.job import CommandReceipt, JobEvent, event_from_message
from cliptune.v1 import job_pb2, training_pb2

METHOD: Final = "TrainingService/Session"


class SessionBook:
    """Which requests wait for an answer, which jobs are watched."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: dict[str, Any] = {}
        self._watched: set[str] = set()

    @property
    def idle(self) -> bool:
        """Whether no job is watched: no event can come."""
        return not self._watched

    def watch(self, waiter: Any, job_id: str, after: int) -> training_pb2.SessionRequest:
        """Begin to watch a job."""
        self._watched.add(job_id)
        watch = training_pb2.WatchJobRequest(job_id=job_id, after_number=after)
        return training_pb2.SessionRequest(request_id=self._wait(waiter), watch=watch)

    def unwatch(self, waiter: Any, job_id: str) -> training_pb2.SessionRequest:
        """Stop watching a job."""
        self._watched.discard(job_id)
        return training_pb2.SessionRequest(request_id=self._wait(waiter), unwatch_job_id=job_id)

    def control(self, waiter: Any, job_id: str, command: job_pb2.JobCommand) -> training_pb2.SessionRequest:
        """Send a command to a job."""
        control = training_pb2.ControlJobRequest(job_id=job_id, command=command)
        return training_pb2.SessionRequest(request_id=self._wait(waiter), control=control)

    def accept(self, answer: training_pb2.SessionResponse) -> JobEvent | None:
        """Take an answer: settles the future that waits for it, or returns an event."""
        kind = answer.WhichOneof("result")
        if kind == "event":
            return event_from_message(answer.event)
        if kind == "watch_ended_job_id":
            self._watched.discard(answer.watch_ended_job_id)
            return None
        waiter = self._waiting.pop(answer.request_id, None)
        if waiter is None or waiter.done():
            return None
        if kind == "error":
            waiter.set_exception(from_detail(answer.error))
        else:
            waiter.set_result(codec.receipt_from_message(answer.control) if kind == "control" else None)
        return None

    def refused(self, job_id: str) -> None:
        """The watch of this job did not begin."""
        self._watched.discard(job_id)

    def end(self, error: CliptuneError) -> None:
        """The stream is over: nobody shall wait for ever."""
        self._watched.clear()
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(error)
        self._waiting.clear()

    def _wait(self, waiter: Any) -> str:
        self._count += 1
        request_id = str(self._count)
        self._waiting[request_id] = waiter
        return request_id


class Session:
    """Watches and controls many jobs over one stream. Made by `Client.session()`; use it in a `with` block.

    with client.session() as session:
        session.watch(first.id)
        session.watch(second.id)
        for event in session:              # ends when every watched job has ended
            if isinstance(event.body, Progress) and event.body.loss > 10:
                session.control(event.job_id, pause())
    """

    def __init__(self, open_stream: Callable[[Iterator[Any]], Any]) -> None:
        self._book: Final = SessionBook()
        self._lock: Final = threading.Lock()
        self._requests: Final[queue.SimpleQueue[training_pb2.SessionRequest | None]] = queue.SimpleQueue()
        self._events: Final[queue.SimpleQueue[JobEvent | CliptuneError | None]] = queue.SimpleQueue()
        self._stream: Final = open_stream(iter(self._requests.get, None))
        self._ended = False
        self._reader: Final = threading.Thread(target=self._read, name="cliptune-session", daemon=True)
        self._reader.start()

    def watch(self, job_id: str, *, after: int = 0) -> None:
        """Begin to watch a job: events with a number greater than `after`. `JobNotFoundError`."""
        waiter: Future[None] = Future()
        with self._lock:
            self._send(self._book.watch(waiter, job_id, after))
        try:
            waiter.result()
        except CliptuneError:
            with self._lock:
                self._book.refused(job_id)
            raise

    def unwatch(self, job_id: str) -> None:
        """Stop watching a job; events on their way may still come."""
        waiter: Future[None] = Future()
        with self._lock:
            self._send(self._book.unwatch(waiter, job_id))
        waiter.result()
        with self._lock:
            self._wake_when_idle()

    def control(self, job_id: str, command: job_pb2.JobCommand) -> CommandReceipt:
        """Send a command (`pause()`, `resume()`, ...); returns when the job has carried it out."""
        waiter: Future[CommandReceipt] = Future()
        with self._lock:
            self._send(self._book.control(waiter, job_id, command))
        return waiter.result()

    def __iter__(self) -> Iterator[JobEvent]:
        """Events of all watched jobs; ends when none of them can bring any more."""
        while True:
            with self._lock:
                if self._book.idle and self._events.empty():
                    return
            event = self._events.get()
            if isinstance(event, CliptuneError):
                raise event
            if event is not None:
                yield event

    def close(self) -> None:
        """End the stream."""
        self._requests.put(None)
        self._stream.cancel()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, request: training_pb2.SessionRequest) -> None:
        if self._ended:
            raise CancelledError("the session is over")
        self._requests.put(request)

    def _read(self) -> None:
        error: CliptuneError = CancelledError("the session is over")
        try:
            for answer in self._stream.answers():
                with self._lock:
                    event = self._book.accept(answer)
                    if event is not None:
                        self._events.put(event)
                    self._wake_when_idle()
        except CliptuneError as failure:
            error = failure
        with self._lock:
            self._ended = True
            self._book.end(error)
            self._events.put(error)

    def _wake_when_idle(self) -> None:
        if self._book.idle:
            self._events.put(None)
