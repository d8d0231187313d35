"""TrainingService over gRPC: a thin face of `Jobs`. Errors leave as exceptions, told by `rpc/errors.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from cliptune.v1 import training_pb2, training_pb2_grpc
from cliptune_server.rpc.training_session import TrainingSession
from cliptune_server.training.jobs import Jobs
from cliptune_server.training.reports import report_of

_Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Each method hands its message to the jobs."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def CreateJob(  # noqa: N802, D102
        self, request: training_pb2.CreateJobRequest, context: _Context
    ) -> training_pb2.CreateJobResponse:
        return training_pb2.CreateJobResponse(job=await self._jobs.create(request))

    async def GetJob(  # noqa: N802, D102
        self, request: training_pb2.GetJobRequest, context: _Context
    ) -> training_pb2.GetJobResponse:
        return training_pb2.GetJobResponse(job=await self._jobs.get(request.job_id))

    async def ListJobs(  # noqa: N802, D102
        self, request: training_pb2.ListJobsRequest, context: _Context
    ) -> training_pb2.ListJobsResponse:
        return await self._jobs.list(request)

    async def DeleteJob(  # noqa: N802, D102
        self, request: training_pb2.DeleteJobRequest, context: _Context
    ) -> training_pb2.DeleteJobResponse:
        await self._jobs.delete(request.job_id)
        return training_pb2.DeleteJobResponse()

    async def WatchJob(  # noqa: N802, D102
        self, request: training_pb2.WatchJobRequest, context: _Context
    ) -> AsyncIterator[training_pb2.WatchJobResponse]:
        async with aclosing(self._jobs.watch(request.job_id, request.after_number)) as events:
            async for event in events:
                yield training_pb2.WatchJobResponse(event=event)

    async def ControlJob(  # noqa: N802, D102
        self, request: training_pb2.ControlJobRequest, context: _Context
    ) -> training_pb2.ControlJobResponse:
        return await self._jobs.control(request.job_id, request.command)

    async def GetJobReport(  # noqa: N802, D102
        self, request: training_pb2.GetJobReportRequest, context: _Context
    ) -> training_pb2.GetJobReportResponse:
        return await report_of(self._jobs, request.job_id)

    async def Session(  # noqa: N802, D102
        self, request_iterator: AsyncIterator[training_pb2.SessionRequest], context: _Context
    ) -> AsyncIterator[training_pb2.SessionResponse]:
        session = TrainingSession(self._jobs)
        try:
            async for response in session.responses(request_iterator):
                yield response
        finally:
            await session.close()
