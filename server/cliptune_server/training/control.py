"""Commands to a job that has not ended: sent to its trainer, or carried out here when it has none.

Enters: a `JobCommand`. Leaves: the number of the event that acknowledges it, once the job has obeyed; after a
pause or a cancel that is when it is in the state. Called by `jobs.py`; what a state allows says `job.py`.
"""

from __future__ import annotations

import asyncio
from typing import Final

from cliptune.errors import DeadlineExceededError, JobStateError, UnavailableError
from cliptune.v1 import job_pb2, training_pb2
from cliptune.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_PAUSED,
    JOB_STATE_PREPARING,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
)
from cliptune_server.training.dispatcher import STOPPING, Dispatcher
from cliptune_server.training.job import check_command, command_name, state_name
from cliptune_server.training.live_job import LiveJob, PendingCommand, command_event


class Control:
    """Steers live jobs."""

    def __init__(self, dispatcher: Dispatcher, *, settle_s: float) -> None:
        self._dispatcher: Final = dispatcher
        self._settle_s: Final = settle_s

    async def carry_out(self, job: LiveJob, command: job_pb2.JobCommand) -> training_pb2.ControlJobResponse:
        """The answer, without the job. Errors: those of `Jobs.control`."""
        name = command_name(command)
        pending = await asyncio.shield(self._dispatcher.spawn(self._begin(job, name, command)))
        number = await asyncio.shield(pending.answer)
        if name in ("pause", "cancel"):
            await self._settled(job, name)
        return training_pb2.ControlJobResponse(command_id=pending.instruction.command_id, event_number=number)

    async def _begin(self, job: LiveJob, name: str, command: job_pb2.JobCommand) -> PendingCommand:
        async with job.deciding:
            check_command(job.state, name, holding=job.record.holding)
            run = self._dispatcher.run_of(job.id)
            if run is not None:
                pending = job.begin_command(command)
                run.instruct(pending.instruction)
                if name == "cancel":
                    self._dispatcher.cancel(run)
                elif name == "yield_to_inference":
                    now_s = asyncio.get_running_loop().time()
                    run.yields_until_s = now_s + command.yield_to_inference.seconds
                return pending
            if job.state == JOB_STATE_RUNNING:
                state = state_name(job.state)
                raise JobStateError(
                    f"the job is {state}: training is done and its model is being published", state=state
                )
            return await self._obey(job, name, command)

    async def _obey(self, job: LiveJob, name: str, command: job_pb2.JobCommand) -> PendingCommand:
        """Carries out a command of a job without a trainer."""
        pending = job.begin_command(command)
        done = command_event(pending.instruction.command_id, name)
        try:
            if name == "resume":
                await job.enter(JOB_STATE_QUEUED, "resumed", before=[done])
                self._dispatcher.schedule()
            else:
                self._dispatcher.scheduler.withdraw(job.id)
                state = JOB_STATE_PAUSED if name == "pause" else JOB_STATE_CANCELLED
                await job.enter(state, f"{name} was asked for", before=[done])
        except BaseException:
            job.pending.pop(pending.instruction.command_id, None)
            raise
        return pending

    async def _settled(self, job: LiveJob, name: str) -> None:
        """The trainer has said yes; the state follows when its process has ended."""

        def settled() -> bool:
            return job.state not in (JOB_STATE_PREPARING, JOB_STATE_RUNNING) and not job.record.holding

        try:
            async with asyncio.timeout(self._settle_s), job.changed:
                await job.changed.wait_for(lambda: settled() or self._dispatcher.stopping)
        except TimeoutError:
            state = state_name(job.state)
            raise DeadlineExceededError(
                f"the trainer accepted the {name} and has not ended within {self._settle_s:g} s; "
                f"the job is still {state}",
                state=state,
                timeout_s=self._settle_s,
            ) from None
        if not settled():
            raise UnavailableError(STOPPING)
