"""The report that a job leaves when it succeeds, as both transports answer with it.

Enters: the jobs and an id. Leaves: the page and its figures. Called by the gRPC and REST faces.
"""

from __future__ import annotations

from cliptune.errors import NotFoundError
from cliptune.v1 import training_pb2
from cliptune_server.training.job import state_name
from cliptune_server.training.job_folder import REPORT_FILES
from cliptune_server.training.jobs import Jobs


async def report_of(jobs: Jobs, job_id: str) -> training_pb2.GetJobReportResponse:
    """The job's report. `JobNotFoundError`; `NotFoundError` for one that has none, saying how it stands."""
    job = await jobs.get(job_id)
    try:
        page, figures = [await jobs.artifact(job_id, "report", name) for name in REPORT_FILES]
    except NotFoundError as error:
        state = state_name(job.state)
        raise NotFoundError(
            f"the job {job_id!r} is {state} and has no report: one is written when a job succeeds",
            job_id=job_id,
            state=state,
        ) from error
    return training_pb2.GetJobReportResponse(html=page.decode(), json=figures.decode())
