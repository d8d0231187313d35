"""Routes for machines: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cliptune.errors import CliptuneError, UnavailableError
from cliptune_server.gateway.context import GatewayContext, context_of
from cliptune_server.gateway.problems import problem_response, problems
from cliptune_server.metrics import CONTENT_TYPE, EngineReading, JobReading

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """What is true now."""

    status: str


@router.get("/healthz", summary="Is the process alive?", response_model=Health)
async def healthz() -> Response:
    """Answers whenever the daemon's loop runs, whatever happens below it."""
    return JSONResponse({"status": "alive"})


@router.get("/readyz", summary="Can it do its work?", response_model=Health, responses=problems(503))
async def readyz(request: Request) -> Response:
    """200 after a canary forward went through the engine; 503 with the reason otherwise."""
    readiness = context_of(request).readiness
    if readiness.ready:
        return JSONResponse({"status": "ready"})
    return problem_response(UnavailableError(readiness.reason or "not ready"), request.url.path)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"description": "docs/metrics.md lists them.", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """The daemon's metrics in Prometheus's text format."""
    context = context_of(request)
    counts = context.jobs.snapshot()
    jobs = JobReading(by_state=counts.by_state, events=counts.events, watchers=counts.watchers)
    shadows = dict(context.router.shadowing.outcomes)
    text = context.metrics.render(await _engine(context), jobs, shadows)
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


async def _engine(context: GatewayContext) -> EngineReading:
    engines = context.engines
    try:
        status = await engines.status()
    except CliptuneError:  # away or stuck: its series are absent, and readiness says why
        status = None
    return EngineReading(ready=engines.ready, restarts=engines.restarts, status=status)
