"""What the routes stand on: the daemon's application objects.

`daemon.py` makes one GatewayContext and hands it to `build_app`; a route takes it with `context_of(request)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from cliptune.errors import InvalidInputError
from cliptune_server.gateway.image_urls import ImageUrls, UrlRules
from cliptune_server.metrics import Metrics

if TYPE_CHECKING:
    from cliptune_server.catalog.models import Models
    from cliptune_server.datasets.datasets import Datasets
    from cliptune_server.inference.engines import EngineSupervisor
    from cliptune_server.inference.router import Router
    from cliptune_server.open_inference.inference import OpenInference
    from cliptune_server.readiness import Readiness
    from cliptune_server.training.jobs import Jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayContext:
    """Everything that the REST face needs."""

    jobs: Jobs
    router: Router
    open_inference: OpenInference
    models: Models
    datasets: Datasets
    engines: EngineSupervisor
    """Read at each scrape of `/metrics`."""
    readiness: Readiness
    metrics: Metrics
    """Told of each request."""
    image_urls: ImageUrls = field(default_factory=lambda: ImageUrls(UrlRules()))
    """Fetches images by their address, where that is allowed."""
    max_body_bytes: int = 256 * 1024 * 1024
    """A longer body is refused before it is read."""
    heartbeat_s: float = 15.0
    """An event stream that has nothing to say for so long says so, which keeps proxies from closing it."""

    def __post_init__(self) -> None:
        if self.max_body_bytes < 1 or self.heartbeat_s <= 0:
            raise InvalidInputError(
                f"max_body_bytes {self.max_body_bytes} and heartbeat_s {self.heartbeat_s} must be above 0"
            )


def context_of(request: Request) -> GatewayContext:
    """The context of the app that serves this request."""
    return cast("GatewayContext", request.app.state.context)
