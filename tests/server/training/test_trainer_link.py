"""The trainer link lets in only the trainer of a job, by its secret."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from cliptune.internal.v1 import trainer_pb2, trainer_pb2_grpc
from cliptune_server.training.job_folder import JobFolder
from tests.server.training.house import LIMIT_S, at_step, collect, create, open_jobs, peer_spec

WRONG = "0" * 64


async def answer_to(socket: Path, first: trainer_pb2.AttachRequest) -> grpc.StatusCode:
    """How the daemon ends a connection that begins with `first`."""
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        call = trainer_pb2_grpc.LinkServiceStub(channel).Attach(iter([first]), timeout=LIMIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(call))
        return refused.value.code()


async def test_a_wrong_secret_an_unknown_job_and_a_former_attempt_are_refused(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        job = await create(jobs, peer_spec(tmp_path, steps=100_000))
        await collect(jobs, job.id, until=at_step(1))
        header, _ = JobFolder(tmp_path / "home" / "jobs" / job.id).load()
        socket = tmp_path / "home" / "link.sock"
        for job_id, secret, attempt, status in (
            (job.id, WRONG, 1, grpc.StatusCode.UNAUTHENTICATED),
            (job.id, "", 1, grpc.StatusCode.UNAUTHENTICATED),
            ("nobody", header.secret, 1, grpc.StatusCode.UNAUTHENTICATED),
            (job.id, header.secret, 7, grpc.StatusCode.FAILED_PRECONDITION),
        ):
            hello = trainer_pb2.Hello(job_id=job_id, secret=secret, attempt=attempt)
            assert await answer_to(socket, trainer_pb2.AttachRequest(hello=hello)) == status
        event = trainer_pb2.AttachRequest(event=trainer_pb2.TrainerEvent(attempt=1, sequence=9))
        assert await answer_to(socket, event) == grpc.StatusCode.INVALID_ARGUMENT
        assert header.secret not in repr(header)
