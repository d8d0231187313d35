"""Routes of fine-tuning jobs: `/v1/jobs`."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cliptune.errors import InvalidInputError
from cliptune.spec import spec_from_mapping
from cliptune.v1 import job_pb2, training_pb2
from cliptune_server.gateway import events
from cliptune_server.gateway.context import context_of
from cliptune_server.gateway.messages import ControlJson, JobJson, JobListJson, JobSpecJson, json_form
from cliptune_server.gateway.problems import problems
from cliptune_server.training.job import FINAL_STATES, LONGEST_YIELD_S
from cliptune_server.training.reports import report_of

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
JobId = Annotated[str, Path(description="The job's id.", examples=["solar-cells-7f3a"])]
_STATES: Final = {
    value.name.removeprefix("JOB_STATE_"): value.number
    for value in job_pb2.JobState.DESCRIPTOR.values
    if value.number
}

_STUDY_TYPES: Final = {
    "best.toml": "application/toml",
    "trials.csv": "text/csv",
    "study.html": "text/html",
}
# The page's own scripts move its plots; they reach nothing else of this origin.
_STUDY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox allow-scripts",
    "Cache-Control": "no-cache",
}
# The page needs neither scripts nor anything from elsewhere: its styles and pictures are in it.
_REPORT_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "Cache-Control": "no-cache",
}
# A later evaluation of the same step draws it anew.
_PICTURE_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


class CreateJob(BaseModel):
    """What to fine-tune."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "spec": {
                        "name": "solar-cells",
                        "model": {"name": "ViT-B-32", "pretrained": "openai"},
                        "data": {"train": "/data/cells.csv", "label_column": "label"},
                        "train": {"epochs": 5},
                    }
                }
            ]
        },
    )
    spec: JobSpecJson = Field(description="The job's spec: the same fields as in a TOML file.")
    validate_only: bool = Field(default=False, description="Stop after the preparation and return the plan.")
    idempotency_key: str = Field(
        default="", description="A second request with the same key returns the first one's job."
    )


class LearningRate(BaseModel):
    """A new peak learning rate; the schedule's shape stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"learning_rate": 1e-5}]})
    learning_rate: float = Field(gt=0, allow_inf_nan=False)


class Yield(BaseModel):
    """For how long."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"seconds": 30}]})
    seconds: float = Field(ge=0, le=LONGEST_YIELD_S, allow_inf_nan=False, description="0 ends it.")


@router.post(
    "",
    summary="Create a job",
    status_code=201,
    response_model=JobJson,
    responses={
        200: {"description": "`validate_only`: the plan; nothing is kept.", "model": JobJson},
        **problems(403, 422),
    },
)
async def create_job(
    request: Request,
    body: CreateJob,
    idempotency_key: Annotated[str, Header(description="The same as in the body.")] = "",
) -> Response:
    """Checks the spec's shape and answers with the job, which is then prepared and queued."""
    wanted = training_pb2.CreateJobRequest(
        spec=spec_from_mapping(body.spec),
        validate_only=body.validate_only,
        idempotency_key=body.idempotency_key or idempotency_key,
    )
    job = await context_of(request).jobs.create(wanted)
    if body.validate_only:
        return JSONResponse(json_form(job))
    return JSONResponse(json_form(job), 201, headers={"Location": f"/v1/jobs/{job.id}"})


@router.get("", summary="List jobs, newest first", response_model=JobListJson)
async def list_jobs(
    request: Request,
    state: Annotated[list[str], Query(description="Only these states, such as RUNNING.")] = [],  # noqa: B006
    page_size: Annotated[int, Query(ge=1, le=1000)] = 100,
    page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
) -> Response:
    """A page of jobs."""
    wanted = [name.upper().removeprefix("JOB_STATE_") for name in state]
    for name in wanted:
        if name not in _STATES:
            allowed = ", ".join(_STATES)
            raise InvalidInputError(f"state {name!r} is none of {allowed}", path="state", allowed=allowed)
    query = training_pb2.ListJobsRequest(
        states=[_STATES[name] for name in wanted], page_size=page_size, page_token=page_token
    )
    return JSONResponse(json_form(await context_of(request).jobs.list(query)))


@router.get("/{job_id}", summary="Get a job", response_model=JobJson, responses=problems(404))
async def get_job(request: Request, job_id: JobId) -> Response:
    """The job as it is now."""
    return JSONResponse(json_form(await context_of(request).jobs.get(job_id)))


@router.get(
    "/{job_id}/pictures/{name}",
    summary="A picture of an evaluation",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}, "description": "A PNG."}, **problems(404)},
)
async def job_picture(
    request: Request,
    job_id: JobId,
    name: Annotated[
        str, Path(description="As `evaluation.pictures` has it.", examples=["confusion-00000120.png"])
    ],
) -> Response:
    """The confusion matrix after training or a requested evaluation."""
    content = await context_of(request).jobs.artifact(job_id, "pictures", name)
    return Response(content, media_type="image/png", headers=_PICTURE_HEADERS)


@router.get(
    "/{job_id}/study/{name}",
    summary="What a study has left",
    response_class=Response,
    responses={
        200: {"content": {kind: {} for kind in _STUDY_TYPES.values()}, "description": "A file."},
        **problems(404),
    },
)
async def study_file(
    request: Request,
    job_id: JobId,
    name: Annotated[str, Path(description="One of " + ", ".join(_STUDY_TYPES), examples=["best.toml"])],
) -> Response:
    """The best settings as a spec, all trials as a table, the plots as a page: when the study has ended."""
    content = await context_of(request).jobs.artifact(job_id, "study", name)
    return Response(content, media_type=_STUDY_TYPES[name], headers=_STUDY_HEADERS)


@router.get(
    "/{job_id}/report",
    summary="A job's report, as a page",
    response_class=Response,
    responses={200: {"content": {"text/html": {}}, "description": "A page."}, **problems(404)},
)
async def job_report(request: Request, job_id: JobId) -> Response:
    """Of a job that has succeeded: spec, data, curves, evaluation, what was kept of general knowledge, cost.

    Readable on its own: save it, and it needs no network.
    """
    report = await report_of(context_of(request).jobs, job_id)
    return Response(report.html, media_type="text/html", headers=_REPORT_HEADERS)


@router.get(
    "/{job_id}/report.json",
    summary="A job's report, as figures",
    response_class=Response,
    responses={200: {"content": {"application/json": {}}, "description": "An object."}, **problems(404)},
)
async def job_report_figures(request: Request, job_id: JobId) -> Response:
    """The same, without the pictures."""
    report = await report_of(context_of(request).jobs, job_id)
    return Response(report.json, media_type="application/json", headers=_REPORT_HEADERS)


@router.delete("/{job_id}", summary="Delete a job", status_code=204, responses=problems(404, 409))
async def delete_job(request: Request, job_id: JobId) -> Response:
    """Only a job that has ended. Its published model stays."""
    await context_of(request).jobs.delete(job_id)
    return Response(status_code=204)


@router.get(
    "/{job_id}/events",
    summary="Watch a job",
    status_code=200,
    response_class=events.EventStream,
    responses={
        200: {
            "description": "Server-sent events; each `data` is a JobEvent.",
            "content": {events.MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        204: {"description": "The job has ended and all its events have been seen: do not reconnect."},
        **problems(404),
    },
)
async def watch_job(
    request: Request,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="Events with a greater number follow.")] = 0,
    last_event_id: Annotated[str | None, Header(description="Sent by a reconnecting browser.")] = None,
) -> Response:
    """Events from any number on, live, until the job ends.

    The names of the events are `state`, `plan`, `progress`, `evaluation`, `checkpoint`, `notice`, `log`,
    `command` and `published`; `end` closes the stream of a job that has ended, `error` (a problem) one that
    broke off.
    """
    context = context_of(request)
    after = events.after_number(last_event_id, after)
    job = await context.jobs.get(job_id)
    if job.state in FINAL_STATES and after >= job.last_event_number > 0:
        return Response(status_code=204)
    return events.EventStream(
        events.frames(
            context.jobs.watch(job_id, after), path=request.url.path, heartbeat_s=context.heartbeat_s
        )
    )


async def _control(request: Request, job_id: str, command: job_pb2.JobCommand) -> Response:
    return JSONResponse(json_form(await context_of(request).jobs.control(job_id, command)))


_CONTROL: Final[dict[str, Any]] = {"response_model": ControlJson, "responses": problems(404, 409)}


@router.post("/{job_id}/pause", summary="Pause", **_CONTROL)
async def pause_job(request: Request, job_id: JobId) -> Response:
    """Checkpoint, then release the device. Returns when the job is PAUSED."""
    return await _control(request, job_id, job_pb2.JobCommand(pause=job_pb2.PauseCommand()))


@router.post("/{job_id}/resume", summary="Resume", **_CONTROL)
async def resume_job(request: Request, job_id: JobId) -> Response:
    """Queue a paused job again."""
    return await _control(request, job_id, job_pb2.JobCommand(resume=job_pb2.ResumeCommand()))


@router.post("/{job_id}/cancel", summary="Cancel", **_CONTROL)
async def cancel_job(request: Request, job_id: JobId) -> Response:
    """End the job; its last checkpoint stays. Returns when the job is CANCELLED."""
    return await _control(request, job_id, job_pb2.JobCommand(cancel=job_pb2.CancelCommand()))


@router.post("/{job_id}/checkpoint", summary="Checkpoint now", **_CONTROL)
async def checkpoint_job(request: Request, job_id: JobId) -> Response:
    """Save now."""
    return await _control(request, job_id, job_pb2.JobCommand(checkpoint=job_pb2.CheckpointCommand()))


@router.post("/{job_id}/evaluate", summary="Evaluate now", **_CONTROL)
async def evaluate_job(request: Request, job_id: JobId) -> Response:
    """Evaluate now."""
    return await _control(request, job_id, job_pb2.JobCommand(evaluate=job_pb2.EvaluateCommand()))


@router.post("/{job_id}/learning-rate", summary="Set the learning rate", **_CONTROL)
async def set_learning_rate(request: Request, job_id: JobId, body: LearningRate) -> Response:
    """Change the peak learning rate; the schedule's shape stays."""
    command = job_pb2.SetLearningRateCommand(learning_rate=body.learning_rate)
    return await _control(request, job_id, job_pb2.JobCommand(set_learning_rate=command))


@router.post("/{job_id}/yield", summary="Yield to inference", **_CONTROL)
async def yield_to_inference(request: Request, job_id: JobId, body: Yield) -> Response:
    """Leave the device to inference for so long, from the next step's end."""
    command = job_pb2.YieldToInferenceCommand(seconds=body.seconds)
    return await _control(request, job_id, job_pb2.JobCommand(yield_to_inference=command))
