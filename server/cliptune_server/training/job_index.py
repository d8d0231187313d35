"""The jobs' rows in the index: lists, pages, look-ups, the messages of jobs that have ended.

Enters: `LiveJob` objects whenever their state changes. Leaves: pages of ids, the last message of an ended
job. Called by `jobs.py`. The folders are the truth: a row that is missing or stale is written again from
them.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy
from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.orm import Session

from cliptune.errors import InvalidInputError
from cliptune.v1 import job_pb2
from cliptune_server.database import Database, JobRow
from cliptune_server.training.job import FINAL_STATES, State, state_name
from cliptune_server.training.live_job import LiveJob

log = logging.getLogger(__name__)

_DEFAULT_PAGE: Final = 100
_LARGEST_PAGE: Final = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Jobs of one page, newest first, as the index knows them."""

    jobs: tuple[job_pb2.Job, ...]
    next_token: str
    """Empty: the last page."""


class JobIndex:
    """Reads and writes rows of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def fresh(self) -> bool:
        """The index was empty at start."""
        return self._database.fresh

    async def save(self, job: LiveJob) -> bool:
        """Writes a job's row. False, and a line in the log, when the index cannot be written (full disk)."""
        row = _row(job)
        try:
            await self._database.run(lambda session: session.merge(row))
        except sqlalchemy.exc.SQLAlchemyError as error:
            log.warning("job %s is not in the index: %s", job.id, error)
            return False
        return True

    async def get(self, job_id: str) -> job_pb2.Job | None:
        """The message of a job as it was last written."""

        def find(session: Session) -> bytes | None:
            row = session.get(JobRow, job_id)
            return None if row is None else row.message

        message = await self._database.run(find)
        return None if message is None else job_pb2.Job.FromString(message)

    async def id_of_key(self, idempotency_key: str) -> str | None:
        """The job that was created with this key."""
        query = select(JobRow.id).where(JobRow.idempotency_key == idempotency_key)
        return await self._database.run(lambda session: session.scalars(query).one_or_none())

    async def ended_ids(self) -> set[str]:
        """Jobs whose rows need no second look."""
        query = select(JobRow.id).where(JobRow.state.in_(FINAL_STATES))
        return await self._database.run(lambda session: set(session.scalars(query)))

    async def keep_only(self, job_ids: set[str]) -> None:
        """Forgets rows whose folders are gone."""

        def sweep(session: Session) -> None:
            for job_id in set(session.scalars(select(JobRow.id))) - job_ids:
                session.execute(delete(JobRow).where(JobRow.id == job_id))

        await self._database.run(sweep)

    async def forget(self, job_id: str) -> None:
        """Deletes a row."""
        await self._database.run(lambda session: session.execute(delete(JobRow).where(JobRow.id == job_id)))

    async def count_by_state(self) -> Counter[str]:
        """ "RUNNING" → how many."""
        query = select(JobRow.state, func.count()).group_by(JobRow.state)
        rows = await self._database.run(lambda session: session.execute(query).all())
        return Counter({state_name(State(state)): int(count) for state, count in rows})

    async def page(self, states: Sequence[State], size: int, token: str) -> Page:
        """A page of jobs, newest first. `InvalidInputError` for a size or token that makes no sense."""
        if size < 0:
            raise InvalidInputError(f"the page size must not be negative, and is {size}", value=size)
        limit = min(size or _DEFAULT_PAGE, _LARGEST_PAGE)
        query = select(JobRow).order_by(JobRow.created_ns.desc(), JobRow.id.desc()).limit(limit + 1)
        if states:
            query = query.where(JobRow.state.in_(states))
        if token:
            created_ns, job_id = _read_token(token)
            query = query.where(tuple_(JobRow.created_ns, JobRow.id) < (created_ns, job_id))
        rows = await self._database.run(lambda session: session.scalars(query).all())
        more = _token(rows[limit - 1]) if len(rows) > limit else ""
        jobs = tuple(job_pb2.Job.FromString(row.message) for row in rows[:limit])
        return Page(jobs=jobs, next_token=more)


def _row(job: LiveJob) -> JobRow:
    record, message = job.record, job.record.message
    return JobRow(
        id=job.id,
        name=message.spec.name,
        state=int(record.state),
        created_ns=job.header.created_ns,
        finished_ns=message.finished.ToNanoseconds(),
        attempt=message.attempt,
        device=message.plan.device,
        queue_ticket_ns=record.ticket_ns if record.state == job_pb2.JOB_STATE_QUEUED else 0,
        idempotency_key=job.header.idempotency_key or None,
        message=message.SerializeToString(),
    )


def _token(row: JobRow) -> str:
    return base64.urlsafe_b64encode(f"{row.created_ns} {row.id}".encode()).decode()


def _read_token(token: str) -> tuple[int, str]:
    try:
        created_ns, _, job_id = base64.urlsafe_b64decode(token.encode()).decode().partition(" ")
        # SQLite's integers have 64 bits.
        if -(2**63) <= (created := int(created_ns)) < 2**63:
            return created, job_id
    except (ValueError, binascii.Error):
        pass
    raise InvalidInputError("this page token is not one of ours", page_token=token)
