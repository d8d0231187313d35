"""The synchronous client: carries out the calls of `codec.py` and `inference_codec.py` over one gRPC channel.

    with Client() as client:
        job = client.create_job("spec.toml")
        for event in client.watch_job(job.id): ...
        vectors = client.embed_images(["cat.jpg"], model="pets@prod")

`AsyncClient` has the same methods with the same arguments. Both are safe to share between threads (tasks).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc

import cliptune.bulk as bulk
import cliptune.bulk_feed as bulk_feed
import cliptune.codec as codec
import cliptune.health as health
import cliptune.inference_codec as inference_codec
import cliptune.session as sessions
import cliptune.watch as watch
from cliptune.address import find_address
from cliptune.channel import (
    DEFAULT_ATTEMPTS,
    DEFAULT_TIMEOUT_S,
    call_span,
    channel_options,
    failure,
    method_path,
    serialize,
    span_metadata,
    start_span,
)
from cliptune.codec import Answer, Call, Request, SpecInput
from cliptune.errors import CliptuneError, UnavailableError
from cliptune.images import ImageInput
from cliptune.inference_codec import ClassesInput, EmbedPlan, OnError
from cliptune.job import CommandReceipt, Job, JobEvent, JobState
from cliptune.model import Model
from cliptune.progress import bulk_bar
from cliptune.results import Classifications, Embedded, Embeddings, Health, PairScores, Similarity
from cliptune.stream import Stream
from cliptune.v1 import inference_pb2, job_pb2, training_pb2

Result = TypeVar("Result")


class Client:
    """A connection to one daemon.

    `address`: "HOST:PORT"; None: CLIPTUNE_ADDRESS, else the daemon of CLIPTUNE_HOME, else 127.0.0.1:50051.
    `timeout_s`: deadline of a call that has none of its own. `attempts`: how often a safe call is sent while
    the daemon is away (1 to 5, with backoff). Connects at the first call. Every method raises
    `CliptuneError`s.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        attempts: int = DEFAULT_ATTEMPTS,
    ) -> None:
        self.address: Final = address or find_address()
        self._timeout_s: Final = timeout_s
        self._channel: Final = grpc.insecure_channel(self.address, options=channel_options(attempts))

    # Jobs

    def create_job(
        self,
        spec: SpecInput,
        *,
        validate_only: bool = False,
        idempotency_key: str = "",
        timeout_s: float | None = None,
    ) -> Job:
        """Submit a spec: a mapping, a `JobSpec` or the path of a TOML, YAML or JSON file.

        `validate_only`: prepare it, return it with its plan, keep nothing. Two calls with one
        `idempotency_key` make one job. `SpecError` names the wrong field; where the shape is wrong, before
        anything is sent.
        """
        call = codec.create_job(spec, validate_only=validate_only, idempotency_key=idempotency_key)
        return self._run(call, timeout_s)

    def get_job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """The job as it stands."""
        return self._run(codec.get_job(job_id), timeout_s)

    def list_jobs(
        self,
        states: Iterable[JobState | str] = (),
        *,
        limit: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Job]:
        """Jobs in these states (default: all), newest first, at most `limit`."""
        states = tuple(states)
        found: list[Job] = []
        token = ""
        while limit is None or len(found) < limit:
            page = self._run(codec.list_jobs(states, token), timeout_s)
            found += page.jobs
            token = page.next_token
            if not token:
                break
        return found[:limit]

    def delete_job(self, job_id: str, *, timeout_s: float | None = None) -> None:
        """Remove a job that has ended, with its checkpoints. `JobStateError` when it has not."""
        self._run(codec.delete_job(job_id), timeout_s)

    def watch_job(
        self, job_id: str, *, after: int = 0, reconnect_s: float = watch.DEFAULT_RECONNECT_S
    ) -> Generator[JobEvent]:
        """Events with a number greater than `after`, then live ones, until the job has ended.

        A lost connection is taken up again after the last event, so that none is missed and none comes twice;
        `UnavailableError` when the daemon stays away for `reconnect_s`.
        """
        cursor = watch.WatchCursor(job_id, after, reconnect_s)
        while not cursor.ended:
            try:
                stream = self._open(watch.METHOD, cursor.request(), training_pb2.WatchJobResponse)
                with closing(stream.answers()) as answers:
                    for answer in answers:
                        event = cursor.accept(answer)
                        if event is not None:
                            yield event
                return
            except UnavailableError as error:
                time.sleep(cursor.wait_s(error))

    def wait_job(self, job_id: str, *, reconnect_s: float = watch.DEFAULT_RECONNECT_S) -> Job:
        """The job when it has ended, whichever way: look at its `state`."""
        job = self.get_job(job_id)
        if not job.state.final:
            for _ in self.watch_job(job_id, after=job.last_event_number, reconnect_s=reconnect_s):
                pass
            job = self.get_job(job_id)
        return job

    def control_job(
        self, job_id: str, command: job_pb2.JobCommand, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Any command; returns when it was carried out. `JobStateError` names a state that forbids it."""
        return self._run(codec.control_job(job_id, command), timeout_s)

    def pause_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Checkpoint, then release the device; returns when the job is PAUSED."""
        return self.control_job(job_id, codec.pause(), timeout_s=timeout_s)

    def resume_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Queue a paused job again."""
        return self.control_job(job_id, codec.resume(), timeout_s=timeout_s)

    def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """End the job; its last checkpoint stays. Returns when it is CANCELLED."""
        return self.control_job(job_id, codec.cancel(), timeout_s=timeout_s)

    def checkpoint_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Save now."""
        return self.control_job(job_id, codec.checkpoint(), timeout_s=timeout_s)

    def evaluate_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Evaluate now; the metrics come as an event."""
        return self.control_job(job_id, codec.evaluate(), timeout_s=timeout_s)

    def set_learning_rate(
        self, job_id: str, learning_rate: float, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Change the peak learning rate of a running job; the schedule's shape stays."""
        return self.control_job(job_id, codec.set_learning_rate(learning_rate), timeout_s=timeout_s)

    def yield_to_inference(
        self, job_id: str, seconds: float, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Leave the device to inference for so long, at most 60 s, from the next step's end; 0 ends it."""
        return self.control_job(job_id, codec.yield_to_inference(seconds), timeout_s=timeout_s)

    def session(self) -> sessions.Session:
        """One stream that watches and controls many jobs."""
        return sessions.Session(
            lambda requests: self._open(sessions.METHOD, requests, training_pb2.SessionResponse)
        )

    # Models

    def list_models(self, name: str = "", *, timeout_s: float | None = None) -> list[Model]:
        """Every published version, or those of one name."""
        return self._run(codec.list_models(name), timeout_s)

    def get_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """The version that "NAME", "NAME:VERSION" or "NAME@ALIAS" means."""
        return self._run(codec.get_model(model), timeout_s)

    def load_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Load for inference; returns when it has answered a canary."""
        return self._run(codec.load_model(model), timeout_s)

    def unload_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Stop serving it; requests in flight and bulk streams that use it are answered first."""
        return self._run(codec.unload_model(model), timeout_s)

    def set_alias(self, model: str, alias: str, *, timeout_s: float | None = None) -> Model:
        """Point NAME@ALIAS at a version; where the alias is served, no request fails meanwhile."""
        return self._run(codec.set_alias(model, alias), timeout_s)

    def delete_alias(self, name: str, alias: str, *, timeout_s: float | None = None) -> None:
        """Remove NAME@ALIAS; the version stays."""
        self._run(codec.delete_alias(name, alias), timeout_s)

    def delete_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Remove "NAME:VERSION". `ModelStateError` while it is loaded or an alias points at it."""
        self._run(codec.delete_model(model), timeout_s)

    # Inference

    def embed_images(
        self,
        images: Sequence[ImageInput],
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Unit vectors [N, D], float32, of images: paths, bytes, Pillow, numpy or torch (`image_message`).

        Long lists go out in several requests, all answered by one version of the model. A failed item raises
        its own error, with `index` in its metadata; with on_error="return" its row is NaN and `.errors` lists
        it.
        """
        return self._embed(EmbedPlan("images", images, model, on_error), timeout_s)

    def embed_texts(
        self,
        texts: Sequence[str],
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Unit vectors [N, D], float32, of texts. Long lists and failed items: as `embed_images`."""
        return self._embed(EmbedPlan("texts", texts, model, on_error), timeout_s)

    def similarity(
        self,
        images: Sequence[ImageInput],
        texts: Sequence[str],
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Similarity:
        """Every image against every text, `scores` [N, M]."""
        return self._run(inference_codec.similarity(images, texts, model, on_error), timeout_s)

    def score_pairs(
        self,
        pairs: Iterable[tuple[ImageInput, str]],
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> PairScores:
        """Image i against text i, `scores` [N]."""
        return self._run(inference_codec.score_pairs(pairs, model, on_error), timeout_s)

    def classify(
        self,
        images: Sequence[ImageInput],
        classes: ClassesInput,
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Classifications:
        """Zero-shot classification: one `Classification` for each image.

        `classes`: labels, or label → prompts (averaged); a label alone is read as "a photo of a {label}".
        """
        return self._run(inference_codec.classify(images, classes, model, on_error), timeout_s)

    def embed_stream(
        self,
        items: Iterable[Any],
        kind: bulk.Kind,
        *,
        model: str = "",
        on_error: OnError = "raise",
        max_in_flight: int = bulk.DEFAULT_IN_FLIGHT,
    ) -> Generator[Embedded]:
        """Embed any number of "images" or "texts" over one stream; answers in the order of the input.

        Items are read as they are needed and at most `max_in_flight` are under way. A lost stream is taken up
        again with what is unanswered.
        """
        window = bulk.BulkWindow(kind, model, max_in_flight, on_error)

        def open_stream(requests: Iterator[Any]) -> Generator[Any]:
            return self._open(bulk.METHOD, requests, inference_pb2.EmbedStreamResponse).answers()

        return bulk_feed.embed_stream(window, items, open_stream)

    def embed_many(
        self,
        items: Iterable[Any],
        kind: bulk.Kind = "images",
        *,
        model: str = "",
        on_error: OnError = "raise",
        max_in_flight: int = bulk.DEFAULT_IN_FLIGHT,
        progress: bool = False,
    ) -> Embeddings:
        """All of `embed_stream` as one array [N, D]. `progress`: show a bar on stderr."""
        collected = bulk.Collected(kind)
        stream = self.embed_stream(items, kind, model=model, on_error=on_error, max_in_flight=max_in_flight)
        with bulk_bar(kind, items, shown=progress) as advance, closing(stream):
            for embedded in stream:
                collected.add(embedded)
                advance()
        return collected.embeddings()

    # The daemon

    def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """Whether the daemon is ready: its models answer a canary."""
        return self._run(health.check(service), timeout_s)

    def wait_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return when the daemon says SERVING; `DeadlineExceededError` after `timeout_s`."""
        stream = self._open(health.WATCH, health.request(""), health.ANSWER, timeout_s, wait_for_ready=True)
        with closing(stream.answers()) as answers:
            for answer in answers:
                if health.status(answer) is Health.SERVING:
                    return
        raise UnavailableError(f"the daemon at {self.address} stopped before it was ready")

    def close(self) -> None:
        """Close the connection; streams that are open end with `CancelledError`."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _embed(self, plan: EmbedPlan, timeout_s: float | None) -> Embeddings:
        parts = []
        for call in plan.calls():
            try:
                parts.append(self._run(call, timeout_s))
            except CliptuneError as error:
                parts.append(plan.recover(call, error))
        return plan.join(parts)

    def _run(self, call: Call[Result], timeout_s: float | None) -> Result:
        timeout_s = timeout_s or call.timeout_s or self._timeout_s
        carry = self._channel.unary_unary(method_path(call.method), serialize, call.answer.FromString)
        with call_span(call.method) as metadata:
            try:
                answer = carry(call.request, timeout=timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                # Not a chain of tracebacks: the failed call says no more. It is the error's `__context__`.
                raise failure(error, self.address, call.method, timeout_s) from None
            return call.parse(answer)

    def _open(
        self,
        method: str,
        request: Request | Iterator[Any],
        answer: Answer,
        timeout_s: float | None = None,
        *,
        wait_for_ready: bool = False,
    ) -> Stream:
        opened: Any = (
            self._channel.stream_stream if isinstance(request, Iterator) else self._channel.unary_stream
        )
        span = start_span(method)
        call = opened(method_path(method), serialize, answer.FromString)(
            request, timeout=timeout_s, metadata=span_metadata(span), wait_for_ready=wait_for_ready
        )
        return Stream(call, span, lambda error: failure(error, self.address, method, timeout_s))
