"""Traces through the engine.

Enters: who asked, and when things happened. Leaves: spans. A request's trace shows its decode, its wait and
its share of forwards; each forward is also a span of its own, `engine.batch`, linked with all requests in it,
because a batch has many parents. Called by the batcher and the servicer; costs nothing for a caller that is
not traced.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.util.types import Attributes

from cliptune.tracing import tracer
from cliptune.v1 import inference_pb2
from cliptune_server.engine.payload import Payload


@dataclass(kw_only=True, slots=True)
class Timings:
    """Where the time of one request went, added to as its items pass the stages. On the event loop only."""

    began_s: float = field(default_factory=time.perf_counter)
    decode_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0
    batch_items: int = 0
    cached_items: int = 0

    def batched(self, queue_s: float, forward_s: float, batch_items: int) -> None:
        """An item has waited so long and was in such a forward."""
        self.queue_s = max(self.queue_s, queue_s)
        self.forward_s = max(self.forward_s, forward_s)
        self.batch_items = max(self.batch_items, batch_items)

    def profile(self) -> inference_pb2.Profile:
        """Up to now, as the answer tells it."""
        return inference_pb2.Profile(
            decode_seconds=self.decode_s,
            queue_seconds=self.queue_s,
            forward_seconds=self.forward_s,
            engine_seconds=time.perf_counter() - self.began_s,
            batch_items=self.batch_items,
            cached_items=self.cached_items,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """A request: its place in a trace, the time that is left for it, and whether others go first."""

    context: Context
    deadline_s: float | None = None
    """By time.monotonic. None: no limit."""
    bulk: bool = False
    """Nobody waits for it: what is interactive goes first."""
    payload: Payload | None = None
    """The bytes of its images, where they are not in its message."""
    timings: Timings = field(default_factory=Timings)

    @classmethod
    def current(
        cls, timeout_s: float | None = None, *, bulk: bool = False, payload: Payload | None = None
    ) -> Caller:
        """The request that this task answers."""
        return cls(
            context=get_current(),
            deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
            bulk=bulk,
            payload=payload,
        )

    def late(self) -> bool:
        """The deadline is over."""
        return self.deadline_s is not None and time.monotonic() >= self.deadline_s

    @property
    def span(self) -> trace.Span:
        """The request's span."""
        return trace.get_current_span(self.context)


def decode_span(caller: Caller, kind: str, items: int) -> trace.Span:
    """Begins with the first item of a request; the caller ends it with the last."""
    attributes: Attributes = {"cliptune.kind": kind, "cliptune.items": items}
    return tracer().start_span("engine.decode", context=caller.context, attributes=attributes)


def trace_batch(model: str, tower: str, parts: Iterable[tuple[Caller, int]], began_ns: int) -> None:
    """A forward that has just ended. `parts`: for each item its caller, and when it was queued."""
    first_queued_ns: dict[int, int] = {}
    items: dict[int, int] = {}
    callers: dict[int, Caller] = {}
    size = 0
    for caller, queued_ns in parts:
        size += 1
        if not caller.span.is_recording():
            continue
        key = id(caller)
        callers[key] = caller
        items[key] = items.get(key, 0) + 1
        first_queued_ns[key] = min(queued_ns, first_queued_ns.get(key, queued_ns))
    if not callers:
        return
    ended_ns = time.time_ns()
    attributes: dict[str, str | int] = {
        "cliptune.model": model,
        "cliptune.tower": tower,
        "cliptune.batch_size": size,
    }
    links = [trace.Link(caller.span.get_span_context()) for caller in callers.values()]
    batch = tracer().start_span(
        "engine.batch", context=Context(), links=links, attributes=attributes, start_time=began_ns
    )
    batch.end(ended_ns)
    for key, caller in callers.items():
        queue = tracer().start_span("engine.queue", context=caller.context, start_time=first_queued_ns[key])
        queue.end(began_ns)
        forward = tracer().start_span(
            "engine.forward",
            context=caller.context,
            links=[trace.Link(batch.get_span_context())],
            attributes={**attributes, "cliptune.items": items[key]},
            start_time=began_ns,
        )
        forward.end(ended_ns)
