"""Metrics of the daemon, in a registry of their own.

In: what the faces tell after each call, and at each scrape a reading of engine and jobs. Out: the text of
`/metrics`. The daemon makes one Metrics and hands it to the gRPC interceptor and the gateway; docs/metrics.md
lists every metric, and a test holds the list against the registry.

What the engine counts (items, batches, forward seconds) starts from zero with each engine process, as
Prometheus expects of a counter whose process restarted.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cliptune.internal.v1 import engine_pb2
from cliptune.v1 import job_pb2

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_QUEUE_LABELS: Final = ("model", "tower")
JOB_STATES: Final = tuple(
    value.name.removeprefix("JOB_STATE_") for value in job_pb2.JobState.DESCRIPTOR.values if value.number
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReading:
    """The engine at a scrape. `status` is None while it does not answer."""

    ready: bool = False
    restarts: int = 0
    status: engine_pb2.StatusResponse | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReading:
    """The jobs at a scrape. `by_state`: "RUNNING" → how many; states left out count 0."""

    by_state: Mapping[str, int] = field(default_factory=dict)
    events: int = 0
    watchers: int = 0


class Metrics:
    """Counts calls as they end; reads engine and jobs when scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rpc_requests = Counter(
            "cliptune_rpc_requests",
            "gRPC calls that ended.",
            ("method", "code"),
            registry=self.registry,
        )
        self._rpc_seconds = Histogram(
            "cliptune_rpc_duration_seconds",
            "Time from a gRPC call's start to its end; streams are not timed.",
            ("method",),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self._http_requests = Counter(
            "cliptune_http_requests",
            "HTTP requests that ended.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "cliptune_http_duration_seconds",
            "Time from an HTTP request's start to its end; event streams are not timed.",
            ("method", "route"),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        build = Info("cliptune_build", "What runs here.", registry=self.registry)
        build.info({"version": importlib.metadata.version("cliptune"), "python": platform.python_version()})
        self._readings = _Readings()
        self.registry.register(self._readings)

    def observe_rpc(self, method: str, code: str, seconds: float | None) -> None:
        """A call of a known gRPC method ended: "cliptune.v1.InferenceService/EmbedTexts", "OK".

        `seconds` is None for a stream, whose length says nothing about us.
        """
        self._rpc_requests.labels(method, code).inc()
        if seconds is not None:
            self._rpc_seconds.labels(method).observe(seconds)

    def observe_http(self, method: str, route: str, status: int, seconds: float | None) -> None:
        """An HTTP request ended. `route` is the template ("/v1/jobs/{job_id}"), so that labels stay few."""
        self._http_requests.labels(method, route, str(status)).inc()
        if seconds is not None:
            self._http_seconds.labels(method, route).observe(seconds)

    def render(
        self,
        engine: EngineReading,
        jobs: JobReading,
        shadows: Mapping[tuple[str, str], int] = MappingProxyType({}),
    ) -> bytes:
        """Everything in Prometheus's text format, CONTENT_TYPE. `shadows`: (model, outcome) → copies."""
        self._readings.engine, self._readings.jobs, self._readings.shadows = engine, jobs, shadows
        return generate_latest(self.registry)


class _Readings(Collector):
    """Turns the newest readings into metrics."""

    def __init__(self) -> None:
        self.engine = EngineReading()
        self.jobs = JobReading()
        self.shadows: Mapping[tuple[str, str], int] = {}
        self._start_time_s = time.time()

    def collect(self) -> Iterable[Metric]:
        yield _gauge(
            "cliptune_start_time_seconds", "When the daemon started, in Unix time.", self._start_time_s
        )
        yield from self._engine()
        copies = CounterMetricFamily(
            "cliptune_shadow_requests",
            "Copies of requests to a version on trial.",
            labels=("model", "outcome"),
        )
        for labels, count in sorted(self.shadows.items()):
            copies.add_metric(labels, count)
        yield copies
        yield from self._jobs()

    def _engine(self) -> Iterable[Metric]:
        engine, status = self.engine, self.engine.status or engine_pb2.StatusResponse()
        yield _gauge(
            "cliptune_engine_ready", "1 if the engine's last canary was answered.", float(engine.ready)
        )
        yield _counter(
            "cliptune_engine_restarts",
            "Engines that were replaced after a crash or a stall.",
            engine.restarts,
        )
        yield _gauge("cliptune_engine_models", "Models loaded.", len(status.models))
        yield _gauge("cliptune_engine_resident_bytes", "Memory of the engine process.", status.resident_bytes)
        yield _gauge(
            "cliptune_engine_running_seconds",
            "Age of the forward that runs now; 0: idle.",
            status.running_seconds,
        )
        waiting = GaugeMetricFamily(
            "cliptune_inference_queue_items", "Items that wait or run.", labels=_QUEUE_LABELS
        )
        items = CounterMetricFamily(
            "cliptune_inference_items", "Images or texts that went through a tower.", labels=_QUEUE_LABELS
        )
        batches = CounterMetricFamily(
            "cliptune_inference_batches", "Forwards of a tower.", labels=_QUEUE_LABELS
        )
        seconds = CounterMetricFamily(
            "cliptune_inference_forward_seconds", "Time spent in forwards.", labels=_QUEUE_LABELS
        )
        oldest = GaugeMetricFamily(
            "cliptune_inference_queue_age_seconds",
            "Age of the item that has waited longest; 0: none waits.",
            labels=_QUEUE_LABELS,
        )
        sizes = HistogramMetricFamily(
            "cliptune_inference_batch_items", "Items of a forward.", labels=_QUEUE_LABELS
        )
        positions = CounterMetricFamily(
            "cliptune_inference_positions",
            "Images, or tokens of texts with their padding, that forwards computed.",
            labels=_QUEUE_LABELS,
        )
        padding = CounterMetricFamily(
            "cliptune_inference_padding_positions", "Of these, padding.", labels=_QUEUE_LABELS
        )
        expired = CounterMetricFamily(
            "cliptune_inference_expired_items",
            "Items whose deadline was over, or could not be kept, before their forward.",
            labels=_QUEUE_LABELS,
        )
        for queue in status.queues:
            labels = (queue.model, queue.tower)
            waiting.add_metric(labels, queue.waiting_items)
            oldest.add_metric(labels, queue.oldest_seconds)
            items.add_metric(labels, queue.items)
            batches.add_metric(labels, queue.batches)
            sizes.add_metric(labels, _cumulated(queue.batch_sizes), sum_value=queue.items)
            positions.add_metric(labels, queue.positions)
            padding.add_metric(labels, queue.padding)
            expired.add_metric(labels, queue.expired_items)
            seconds.add_metric(labels, queue.forward_seconds)
        yield from (waiting, oldest, items, batches, sizes, positions, padding, expired, seconds)
        fidelity = GaugeMetricFamily(
            "cliptune_engine_model_cosine",
            "Least measured cosine of a model's served embeddings to the exact ones.",
            labels=("model", "stage", "way"),
        )
        for model in status.models:
            fidelity.add_metric((model.key, "precision", model.precision), model.precision_cosine)
            fidelity.add_metric((model.key, "decode", model.decode), model.decode_cosine)
        yield fidelity
        if engine.status is not None:
            yield from _engine_totals(status)

    def _jobs(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("cliptune_jobs", "Jobs by state.", labels=("state",))
        for state in JOB_STATES:
            jobs.add_metric((state,), self.jobs.by_state.get(state, 0))
        yield jobs
        yield _counter("cliptune_job_events", "Public job events since the daemon started.", self.jobs.events)
        yield _gauge("cliptune_job_watchers", "Watches open now, over both transports.", self.jobs.watchers)


def _engine_totals(status: engine_pb2.StatusResponse) -> Iterable[Metric]:
    """What is not of one model."""
    yield _counter(
        "cliptune_inference_decode_seconds",
        "Time that threads spent on decoding images.",
        status.decode_seconds,
    )
    yield _counter("cliptune_inference_decoded_items", "Images that were decoded.", status.decoded_items)
    yield _counter(
        "cliptune_inference_shed_requests",
        "Requests that were refused for want of room or of time.",
        status.shed_requests,
    )
    yield _counter(
        "cliptune_inference_cache_hits", "Items whose embedding was remembered.", status.cache.hits
    )
    yield _counter(
        "cliptune_inference_cache_misses", "Items whose embedding was not remembered.", status.cache.misses
    )
    yield _gauge("cliptune_inference_cache_bytes", "Memory of remembered embeddings.", status.cache.bytes)


def _cumulated(batch_sizes: Sequence[int]) -> list[tuple[str, float]]:
    """Batches of at most 1, 2, 4, ... items, as Prometheus has histograms: each with those before it."""
    counts = list(itertools.accumulate(batch_sizes)) or [0]
    bounds = [str(float(2**power)) for power in range(len(counts) - 1)]
    return [(bound, float(count)) for bound, count in zip([*bounds, "+Inf"], counts, strict=True)]


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)
