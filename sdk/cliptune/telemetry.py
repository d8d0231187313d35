"""Logs and traces of a process: set up once by its `main`, silent unless someone listens.

In: a level, the process's name and the standard OTEL_* variables. Out: a configured logging tree (structlog
and the standard library through one handler on stderr) and a tracer provider. Called by the `main` of daemon,
engine, trainer and demo; a library never calls it. structlog and the OpenTelemetry SDK come with the extras
`server` and `trainer`, so they are imported inside.

What is bound with `structlog.contextvars.bound_contextvars(job_id=...)` stands in every line logged below it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace

from cliptune.errors import InvalidInputError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter

LEVELS: Final = ("debug", "info", "warning", "error")
# Our own lines say more about a request than these do, and say it once.
_CHATTY_LOGGERS: Final = ("asyncio", "httpx", "httpcore", "PIL", "sqlalchemy", "urllib3", "uvicorn.access")
_REPEAT_AFTER_S: Final = 300.0
# A collector that hangs may hold up the end of a process so long and no longer.
_SHUTDOWN_LIMIT_S: Final = 3.0

_log = logging.getLogger(__name__)


def configure_logging(level: str = "info", service: str = "cliptune") -> None:
    """Send every log line of this process to stderr: JSON, one object a line, or coloured text on a terminal.

    Each line has `timestamp` (UTC), `level`, `event`, `logger`, `service`, what is bound through structlog's
    contextvars (`job_id`), and `trace_id` and `span_id` inside a span. Raises InvalidInputError for an
    unknown level.
    """
    import structlog

    if level.lower() not in LEVELS:
        allowed = ", ".join(LEVELS)
        raise InvalidInputError(f"log level {level!r} is none of {allowed}", allowed=allowed)

    def add_service(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        return event

    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        _add_trace_ids,
    ]
    render: list[structlog.typing.Processor]
    if sys.stderr.isatty():
        render = [structlog.dev.ConsoleRenderer()]
    else:
        render = [structlog.processors.format_exc_info, _finite, structlog.processors.JSONRenderer()]

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    handler.addFilter(RepeatFilter(("opentelemetry",), _REPEAT_AFTER_S))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *before,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.captureWarnings(True)


def configure_tracing(service_name: str) -> Callable[[], None]:
    """Install the tracer provider of this process; returns what to call at its end (flushes, within 3 s).

    Spans are exported over OTLP/HTTP when OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or
    OTEL_TRACES_EXPORTER=otlp says so, printed to stderr with OTEL_TRACES_EXPORTER=console, and go nowhere
    otherwise: then they are not recorded, but have ids, so that the lines of one request can be found in the
    logs. `service_name` gives way to OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; OTEL_SDK_DISABLED turns
    everything off.

    A provider that is already there (an application that embeds us) is left as it is. A collector that cannot
    be reached costs its spans and one log line each five minutes.
    """
    names = exporter_names(os.environ)
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return _nothing
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
    except ImportError:
        if names:
            _log.warning("traces are not exported: the OpenTelemetry SDK comes with cliptune[server]")
        return _nothing
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return _nothing

    exporters = [exporter for exporter in map(_exporter, names) if exporter is not None]
    provider = TracerProvider(
        resource=_resource(service_name),
        sampler=None if exporters else ParentBased(root=ALWAYS_OFF),
        shutdown_on_exit=False,
    )
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)

    def shutdown() -> None:
        flush = threading.Thread(target=provider.shutdown, name="trace-shutdown", daemon=True)
        flush.start()
        flush.join(_SHUTDOWN_LIMIT_S)

    return shutdown


def exporter_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where spans go, by the standard variables: some of "otlp" and "console", or nowhere."""
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if not named:
        endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        return ("otlp",) if any(environ.get(name, "").strip() for name in endpoints) else ()
    wanted = dict.fromkeys(name.strip() for name in named.split(",") if name.strip())
    unknown = [name for name in wanted if name not in ("otlp", "console", "none")]
    if unknown:
        _log.warning("OTEL_TRACES_EXPORTER: %s is none of otlp, console, none", ", ".join(unknown))
    return () if "none" in wanted else tuple(name for name in wanted if name in ("otlp", "console"))


class RepeatFilter(logging.Filter):
    """Lets a message of the named loggers through once in `interval_s`, without its traceback.

    For what fails on every try while the product works on, such as the export of spans.
    """

    def __init__(self, prefixes: Sequence[str], interval_s: float) -> None:
        super().__init__()
        self._prefixes = tuple(prefixes)
        self._interval_s = interval_s
        self._last_s: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be written."""
        if not record.name.startswith(self._prefixes):
            return True
        now_s, key = time.monotonic(), (record.name, record.lineno)
        last_s = self._last_s.get(key)
        if last_s is not None and now_s - last_s < self._interval_s:
            return False
        self._last_s[key] = now_s
        record.exc_info = record.exc_text = None
        return True


def _exporter(name: str) -> SpanExporter | None:
    """The exporter of this name; None, with a log line, when the variables that describe it make no sense."""
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    if name == "console":  # stdout belongs to the machine-readable lines
        return ConsoleSpanExporter(out=sys.stderr)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    except (ImportError, ValueError, OSError) as error:
        _log.warning("traces are not exported: %s", error)
        return None


def _resource(service_name: str) -> Resource:
    """What the variables say about this process; what they leave open is ours."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    # Of daemon, engine and trainer each, also where OTEL_SERVICE_NAME gives all of them one name.
    ours: dict[str, str | int] = {"cliptune.process": service_name, "process.pid": os.getpid()}
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        ours[SERVICE_NAME] = service_name
    return resource.merge(Resource(ours))


def _add_trace_ids(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"] = trace.format_trace_id(span.trace_id)
        event["span_id"] = trace.format_span_id(span.span_id)
    return event


def _finite(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """JSON has no NaN: a loss that is one must not make its line unreadable."""
    for key, value in event.items():
        if isinstance(value, float) and not math.isfinite(value):
            event[key] = str(value)
    return event


def _nothing() -> None:
    """Nothing was set up, nothing is to be ended."""
