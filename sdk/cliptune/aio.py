"""The asynchronous client: the methods of `Client`, awaited, over one `grpc.aio` channel.

    async with AsyncClient() as client:
        job = await client.create_job("spec.toml")
        async for event in client.watch_job(job.id): ...
        vectors = await client.embed_images(["cat.jpg"], model="pets@prod")

What is sent and how it is read stands in `codec.py` and `inference_codec.py`, shared with `Client`. Files are
read in threads, so the loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc.aio

import cliptune.bulk as bulk
import cliptune.bulk_feed_aio as bulk_feed_aio
import cliptune.codec as codec
import cliptune.health as health
import cliptune.inference_codec as inference_codec
import cliptune.session as session
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
from cliptune.session_aio import AsyncSession
from cliptune.stream import AsyncStream
from cliptune.v1 import inference_pb2, job_pb2, training_pb2

Result = TypeVar("Result")


class AsyncClient:
    """A connection to one daemon, for one event loop. Arguments and methods are `Client`'s."""

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        attempts: int = DEFAULT_ATTEMPTS,
    ) -> None:
        self.address: Final = address or find_address()
        self._timeout_s: Final = timeout_s
        self._options: Final = channel_options(attempts)
        self._opened: grpc.aio.Channel | None = None

    # Jobs

    async def create_job(
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
        call = await asyncio.to_thread(
            codec.create_job, spec, validate_only=validate_only, idempotency_key=idempotency_key
        )
        return await self._run(call, timeout_s)

    async def get_job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """The job as it stands."""
        return await self._run(codec.get_job(job_id), timeout_s)

    async def list_jobs(
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
            page = await self._run(codec.list_jobs(states, token), timeout_s)
            found += page.jobs
            token = page.next_token
            if not token:
                break
        return found[:limit]

    async def delete_job(self, job_id: str, *, timeout_s: float | None = None) -> None:
        """Remove a job that has ended, with its checkpoints. `JobStateError` when it has not."""
        await self._run(codec.delete_job(job_id), timeout_s)

    async def watch_job(
        self, job_id: str, *, after: int = 0, reconnect_s: float = watch.DEFAULT_RECONNECT_S
    ) -> AsyncGenerator[JobEvent]:
        """Events with a number greater than `after`, then live ones, until the job has ended.

        A lost connection is taken up again after the last event, so that none is missed and none comes twice;
        `UnavailableError` when the daemon stays away for `reconnect_s`.
        """
        cursor = watch.WatchCursor(job_id, after, reconnect_s)
        while not cursor.ended:
            try:
                stream = self._open(watch.METHOD, cursor.request(), training_pb2.WatchJobResponse)
                async with aclosing(stream.answers()) as answers:
                    async for answer in answers:
                        event = cursor.accept(answer)
                        if event is not None:
                            yield event
                return
            except UnavailableError as error:
                await asyncio.sleep(cursor.wait_s(error))

    async def wait_job(self, job_id: str, *, reconnect_s: float = watch.DEFAULT_RECONNECT_S) -> Job:
        """The job when it has ended, whichever way: look at its `state`."""
        job = await self.get_job(job_id)
        if not job.state.final:
            async for _ in self.watch_job(job_id, after=job.last_event_number, reconnect_s=reconnect_s):
                pass
            job = await self.get_job(job_id)
        return job

    async def control_job(
        self, job_id: str, command: job_pb2.JobCommand, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Any command; returns when it was carried out. `JobStateError` names a state that forbids it."""
        return await self._run(codec.control_job(job_id, command), timeout_s)

    async def pause_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Checkpoint, then release the device; returns when the job is PAUSED."""
        return await self.control_job(job_id, codec.pause(), timeout_s=timeout_s)

    async def resume_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Queue a paused job again."""
        return await self.control_job(job_id, codec.resume(), timeout_s=timeout_s)

    async def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """End the job; its last checkpoint stays. Returns when it is CANCELLED."""
        return await self.control_job(job_id, codec.cancel(), timeout_s=timeout_s)

    async def checkpoint_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Save now."""
        return await self.control_job(job_id, codec.checkpoint(), timeout_s=timeout_s)

    async def evaluate_job(self, job_id: str, *, timeout_s: float | None = None) -> CommandReceipt:
        """Evaluate now; the metrics come as an event."""
        return await self.control_job(job_id, codec.evaluate(), timeout_s=timeout_s)

    async def set_learning_rate(
        self, job_id: str, learning_rate: float, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Change the peak learning rate of a running job; the schedule's shape stays."""
        return await self.control_job(job_id, codec.set_learning_rate(learning_rate), timeout_s=timeout_s)

    async def yield_to_inference(
        self, job_id: str, seconds: float, *, timeout_s: float | None = None
    ) -> CommandReceipt:
        """Leave the device to inference for so long, at most 60 s, from the next step's end; 0 ends it."""
        return await self.control_job(job_id, codec.yield_to_inference(seconds), timeout_s=timeout_s)

    def session(self) -> AsyncSession:
        """One stream that watches and controls many jobs."""
        return AsyncSession(
            lambda requests: self._open(session.METHOD, requests, training_pb2.SessionResponse)
        )

    # Models

    async def list_models(self, name: str = "", *, timeout_s: float | None = None) -> list[Model]:
        """Every published version, or those of one name."""
        return await self._run(codec.list_models(name), timeout_s)

    async def get_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """The version that "NAME", "NAME:VERSION" or "NAME@ALIAS" means."""
        return await self._run(codec.get_model(model), timeout_s)

    async def load_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Load for inference; returns when it has answered a canary."""
        return await self._run(codec.load_model(model), timeout_s)

    async def unload_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Stop serving it; requests in flight and bulk streams that use it are answered first."""
        return await self._run(codec.unload_model(model), timeout_s)

    async def set_alias(self, model: str, alias: str, *, timeout_s: float | None = None) -> Model:
        """Point NAME@ALIAS at a version; where the alias is served, no request fails meanwhile."""
        return await self._run(codec.set_alias(model, alias), timeout_s)

    async def delete_alias(self, name: str, alias: str, *, timeout_s: float | None = None) -> None:
        """Remove NAME@ALIAS; the version stays."""
        await self._run(codec.delete_alias(name, alias), timeout_s)

    async def delete_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Remove "NAME:VERSION". `ModelStateError` while it is loaded or an alias points at it."""
        await self._run(codec.delete_model(model), timeout_s)

    # Inference

    async def embed_images(
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
        return await self._embed(EmbedPlan("images", images, model, on_error), timeout_s)

    async def embed_texts(
        self,
        texts: Sequence[str],
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Unit vectors [N, D], float32, of texts. Long lists and failed items: as `embed_images`."""
        return await self._embed(EmbedPlan("texts", texts, model, on_error), timeout_s)

    async def similarity(
        self,
        images: Sequence[ImageInput],
        texts: Sequence[str],
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Similarity:
        """Every image against every text, `scores` [N, M]."""
        call = await asyncio.to_thread(inference_codec.similarity, images, texts, model, on_error)
        return await self._run(call, timeout_s)

    async def score_pairs(
        self,
        pairs: Iterable[tuple[ImageInput, str]],
        *,
        model: str = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> PairScores:
        """Image i against text i, `scores` [N]."""
        call = await asyncio.to_thread(inference_codec.score_pairs, pairs, model, on_error)
        return await self._run(call, timeout_s)

    async def classify(
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
        call = await asyncio.to_thread(inference_codec.classify, images, classes, model, on_error)
        return await self._run(call, timeout_s)

    def embed_stream(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        kind: bulk.Kind,
        *,
        model: str = "",
        on_error: OnError = "raise",
        max_in_flight: int = bulk.DEFAULT_IN_FLIGHT,
    ) -> AsyncGenerator[Embedded]:
        """Embed any number of "images" or "texts" over one stream; answers in the order of the input.

        Items are read as they are needed and at most `max_in_flight` are under way. A lost stream is taken up
        again with what is unanswered.
        """
        window = bulk.BulkWindow(kind, model, max_in_flight, on_error)

        def open_stream(requests: AsyncIterator[Any]) -> AsyncGenerator[Any]:
            return self._open(bulk.METHOD, requests, inference_pb2.EmbedStreamResponse).answers()

        return bulk_feed_aio.embed_stream(window, items, open_stream)

    async def embed_many(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
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
        with bulk_bar(kind, items, shown=progress) as advance:
            async with aclosing(stream):
                async for embedded in stream:
                    collected.add(embedded)
                    advance()
        return collected.embeddings()

    # The daemon

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """Whether the daemon is ready: its models answer a canary."""
        return await self._run(health.check(service), timeout_s)

    async def wait_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return when the daemon says SERVING; `DeadlineExceededError` after `timeout_s`."""
        stream = self._open(health.WATCH, health.request(""), health.ANSWER, timeout_s, wait_for_ready=True)
        async with aclosing(stream.answers()) as answers:
            async for answer in answers:
                if health.status(answer) is Health.SERVING:
                    return
        raise UnavailableError(f"the daemon at {self.address} stopped before it was ready")

    async def close(self) -> None:
        """Close the connection; streams that are open end with `CancelledError`."""
        if self._opened is not None:
            await self._opened.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _embed(self, plan: EmbedPlan, timeout_s: float | None) -> Embeddings:
        parts = []
        calls = plan.calls()
        while (call := await asyncio.to_thread(next, calls, None)) is not None:
            try:
                parts.append(await self._run(call, timeout_s))
            except CliptuneError as error:
                parts.append(plan.recover(call, error))
        return plan.join(parts)

    async def _run(self, call: Call[Result], timeout_s: float | None) -> Result:
        timeout_s = timeout_s or call.timeout_s or self._timeout_s
        carry = self._channel().unary_unary(method_path(call.method), serialize, call.answer.FromString)
        with call_span(call.method) as metadata:
            try:
                answer = await carry(call.request, timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                # Not a chain of tracebacks: the failed call says no more. It is the error's `__context__`.
                raise failure(error, self.address, call.method, timeout_s) from None
            return call.parse(answer)

    def _open(
        self,
        method: str,
        request: Request | AsyncIterator[Any],
        answer: Answer,
        timeout_s: float | None = None,
        *,
        wait_for_ready: bool = False,
    ) -> AsyncStream:
        opened: Any = (
            self._channel().stream_stream
            if isinstance(request, AsyncIterator)
            else self._channel().unary_stream
        )
        span = start_span(method)
        call = opened(method_path(method), serialize, answer.FromString)(
            request, timeout=timeout_s, metadata=span_metadata(span), wait_for_ready=wait_for_ready
        )
        return AsyncStream(call, span, lambda error: failure(error, self.address, method, timeout_s))

    def _channel(self) -> grpc.aio.Channel:
        # Opened at the first call, since a channel belongs to the loop that runs then.
        if self._opened is None:
            self._opened = grpc.aio.insecure_channel(self.address, options=self._options)
        return self._opened
