"""Training and model calls as values: what is sent, how its answer is read, how long it may take.

Pure: nothing here knows a channel. `Client` and `AsyncClient` differ only in how they carry a `Call` out, so
a call is described once. Inference, which may fail item by item, is in `inference_codec.py`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

from cliptune.errors import InvalidInputError
from cliptune.job import (
    STATE_NUMBERS,
    CommandReceipt,
    Job,
    JobState,
    job_from_message,
)
from cliptune.model import Model, model_from_message
from cliptune.report import JobReport, report_from_message
from cliptune.spec import load_spec, spec_from_mapping, validate_shape, with_paths_from
from cliptune.v1 import job_pb2, model_pb2, spec_pb2, training_pb2

Result = TypeVar("Result")
SpecInput: TypeAlias = spec_pb2.JobSpec | Mapping[str, Any] | str | os.PathLike[str]

# Work behind these is real: a model is loaded, a checkpoint written, data read.
LONG_S: Final = 600.0
_PAGE_SIZE: Final = 100


class Request(Protocol):
    """A message."""

    def SerializeToString(self) -> bytes:  # noqa: N802 (protobuf's name)
        """Its bytes."""


class Answer(Protocol):
    """A message class."""

    @staticmethod
    def FromString(data: bytes, /) -> Any:  # noqa: N802 (protobuf's name)
        """Parse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[Result]):
    """One unary call."""

    method: str
    """ "Service/Method" within cliptune.v1."""
    request: Request
    answer: Answer
    parse: Callable[[Any], Result]
    """Answer → what the user gets."""
    timeout_s: float | None = None
    """None: the client's default."""
    item_field: str = ""
    """Set when the request holds one item: the list it is from, and its place there."""
    item_index: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPage:
    """Some of the jobs; `next_token` is empty on the last page."""

    jobs: tuple[Job, ...]
    next_token: str


def create_job(spec: SpecInput, *, validate_only: bool, idempotency_key: str) -> Call[Job]:
    """Checks the spec's shape here, before anything is sent: `SpecError`."""
    request = training_pb2.CreateJobRequest(
        spec=_job_spec(spec), validate_only=validate_only, idempotency_key=idempotency_key or uuid.uuid4().hex
    )
    return Call(
        method="TrainingService/CreateJob",
        request=request,
        answer=training_pb2.CreateJobResponse,
        parse=lambda answer: job_from_message(answer.job),
        timeout_s=LONG_S if validate_only else None,
    )


def get_job(job_id: str) -> Call[Job]:
    """One job."""
    return Call(
        method="TrainingService/GetJob",
        request=training_pb2.GetJobRequest(job_id=job_id),
        answer=training_pb2.GetJobResponse,
        parse=lambda answer: job_from_message(answer.job),
    )


def job_report(job_id: str) -> Call[JobReport]:
    """What a job that has succeeded leaves."""
    return Call(
        method="TrainingService/GetJobReport",
        request=training_pb2.GetJobReportRequest(job_id=job_id),
        answer=training_pb2.GetJobReportResponse,
        parse=report_from_message,
    )


def list_jobs(states: Iterable[JobState | str], page_token: str) -> Call[JobPage]:
    """One page, newest first."""
    return Call(
        method="TrainingService/ListJobs",
        request=training_pb2.ListJobsRequest(
            states=[_state_number(state) for state in states], page_size=_PAGE_SIZE, page_token=page_token
        ),
        answer=training_pb2.ListJobsResponse,
        parse=lambda answer: JobPage(
            jobs=tuple(job_from_message(job) for job in answer.jobs), next_token=answer.next_page_token
        ),
    )


def delete_job(job_id: str) -> Call[None]:
    """Only a job that has ended."""
    return Call(
        method="TrainingService/DeleteJob",
        request=training_pb2.DeleteJobRequest(job_id=job_id),
        answer=training_pb2.DeleteJobResponse,
        parse=_nothing,
    )


def control_job(job_id: str, command: job_pb2.JobCommand) -> Call[CommandReceipt]:
    """Answered when the job has carried the command out."""
    return Call(
        method="TrainingService/ControlJob",
        request=training_pb2.ControlJobRequest(job_id=job_id, command=command),
        answer=training_pb2.ControlJobResponse,
        parse=receipt_from_message,
        timeout_s=LONG_S,
    )


def receipt_from_message(answer: training_pb2.ControlJobResponse) -> CommandReceipt:
    """The view of a `ControlJobResponse`."""
    return CommandReceipt(
        command_id=answer.command_id, event_number=answer.event_number, job=job_from_message(answer.job)
    )


def pause() -> job_pb2.JobCommand:
    """Checkpoint, then release the device."""
    return job_pb2.JobCommand(pause=job_pb2.PauseCommand())


def resume() -> job_pb2.JobCommand:
    """Queue a paused job again."""
    return job_pb2.JobCommand(resume=job_pb2.ResumeCommand())


def cancel() -> job_pb2.JobCommand:
    """End the job; its last checkpoint stays."""
    return job_pb2.JobCommand(cancel=job_pb2.CancelCommand())


def checkpoint() -> job_pb2.JobCommand:
    """Save now."""
    return job_pb2.JobCommand(checkpoint=job_pb2.CheckpointCommand())


def evaluate() -> job_pb2.JobCommand:
    """Evaluate now."""
    return job_pb2.JobCommand(evaluate=job_pb2.EvaluateCommand())


def set_learning_rate(learning_rate: float) -> job_pb2.JobCommand:
    """Change the peak learning rate; the schedule's shape stays."""
    return job_pb2.JobCommand(set_learning_rate=job_pb2.SetLearningRateCommand(learning_rate=learning_rate))


def yield_to_inference(seconds: float) -> job_pb2.JobCommand:
    """Leave the device to inference for so long, at most 60 s, from the next step's end; 0 ends it."""
    return job_pb2.JobCommand(yield_to_inference=job_pb2.YieldToInferenceCommand(seconds=seconds))


def list_models(name: str) -> Call[list[Model]]:
    """Every version, or every version of one name."""
    return Call(
        method="ModelService/ListModels",
        request=model_pb2.ListModelsRequest(name=name),
        answer=model_pb2.ListModelsResponse,
        parse=lambda answer: [model_from_message(model) for model in answer.models],
    )


def get_model(model: str) -> Call[Model]:
    """One version."""
    return Call(
        method="ModelService/GetModel",
        request=model_pb2.GetModelRequest(model=model),
        answer=model_pb2.GetModelResponse,
        parse=_model,
    )


def load_model(model: str) -> Call[Model]:
    """Answered when the model has answered a canary."""
    return Call(
        method="ModelService/LoadModel",
        request=model_pb2.LoadModelRequest(model=model),
        answer=model_pb2.LoadModelResponse,
        parse=_model,
        timeout_s=LONG_S,
    )


def unload_model(model: str) -> Call[Model]:
    """Answered when its requests in flight are."""
    return Call(
        method="ModelService/UnloadModel",
        request=model_pb2.UnloadModelRequest(model=model),
        answer=model_pb2.UnloadModelResponse,
        parse=_model,
        timeout_s=LONG_S,
    )


def set_alias(model: str, alias: str) -> Call[Model]:
    """Point NAME@ALIAS at a version; a served alias moves when the new version is loaded."""
    return Call(
        method="ModelService/SetAlias",
        request=model_pb2.SetAliasRequest(model=model, alias=alias),
        answer=model_pb2.SetAliasResponse,
        parse=_model,
        timeout_s=LONG_S,
    )


def set_traffic(model: str, shares: Mapping[int, float], shadow: int) -> Call[Model]:
    """Share the requests for NAME@ALIAS among versions; copy them to `shadow`."""
    traffic = model_pb2.Traffic(
        shares=[model_pb2.TrafficShare(version=each, share=share) for each, share in shares.items()],
        shadow_version=shadow,
    )
    return Call(
        method="ModelService/SetTraffic",
        request=model_pb2.SetTrafficRequest(model=model, traffic=traffic),
        answer=model_pb2.SetTrafficResponse,
        parse=_model,
        timeout_s=LONG_S,
    )


def delete_alias(name: str, alias: str) -> Call[None]:
    """The version it named stays."""
    return Call(
        method="ModelService/DeleteAlias",
        request=model_pb2.DeleteAliasRequest(name=name, alias=alias),
        answer=model_pb2.DeleteAliasResponse,
        parse=_nothing,
    )


def delete_model(model: str) -> Call[None]:
    """Refused while the version is loaded or an alias points at it."""
    return Call(
        method="ModelService/DeleteModel",
        request=model_pb2.DeleteModelRequest(model=model),
        answer=model_pb2.DeleteModelResponse,
        parse=_nothing,
    )


def _job_spec(spec: SpecInput) -> spec_pb2.JobSpec:
    if isinstance(spec, spec_pb2.JobSpec):
        validate_shape(spec)
        return spec
    if isinstance(spec, Mapping):
        return with_paths_from(Path.cwd(), spec_from_mapping(spec))
    return load_spec(spec)


def _state_number(state: JobState | str) -> job_pb2.JobState.ValueType:
    try:
        return STATE_NUMBERS[JobState(state.upper())]
    except (KeyError, ValueError):
        allowed = ", ".join(STATE_NUMBERS)
        raise InvalidInputError(f"{state!r} is no state; allowed: {allowed}", allowed=allowed) from None


def _model(answer: Any) -> Model:
    return model_from_message(answer.model)


def _nothing(answer: Any) -> None:
    """An empty answer."""
