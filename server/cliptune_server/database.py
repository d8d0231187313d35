"""The index: a SQLite file that answers lists and look-ups and can be rebuilt from the files at any time.

Enters: functions over an SQLAlchemy `Session`, run one after the other in a thread of the database's own.
Leaves: what they return. Called by `training/job_index.py` and the registry; nothing is stored here alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

log = logging.getLogger(__name__)

# Raised whenever a table changes: an index of another layout is thrown away and rebuilt.
_LAYOUT: Final = 3

Result = TypeVar("Result")


class Base(DeclarativeBase):
    """All tables of the index."""


class JobRow(Base):
    """A job, as far as lists and look-ups need it."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    state: Mapped[int] = mapped_column(index=True)
    """`JobState`."""
    created_ns: Mapped[int] = mapped_column(sqlalchemy.BigInteger, index=True)
    """UTC, since 1970; with the id it orders lists."""
    finished_ns: Mapped[int] = mapped_column(sqlalchemy.BigInteger, default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    device: Mapped[str] = mapped_column(default="")
    queue_ticket_ns: Mapped[int] = mapped_column(sqlalchemy.BigInteger, default=0)
    """Place in the queue: the lowest is next. 0: not queued."""
    idempotency_key: Mapped[str | None] = mapped_column(unique=True, default=None)
    message: Mapped[bytes]
    """The whole `Job`, serialised: the answer for an ended job."""


class Database:
    """The open index. Calls run in one thread, in the order they came, never on the event loop."""

    def __init__(self, engine: sqlalchemy.Engine, *, fresh: bool) -> None:
        self.fresh: Final = fresh
        """The file was missing or unreadable: its owners have to fill it from the files."""
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")

    @classmethod
    def open(cls, path: Path) -> Database:
        """Opens the index at `path`; a missing or damaged one, or another layout, starts empty (`fresh`).

        Tables are those whose modules are imported by now. Blocking; called before the loop serves anything.
        """
        engine = _engine(path)
        fresh = not path.exists()
        try:
            fresh = _layout(engine) != _LAYOUT or fresh
            if fresh:
                Base.metadata.drop_all(engine)
            _create(engine)
        except sqlalchemy.exc.DatabaseError as error:
            log.warning("the index %s is damaged and will be rebuilt: %s", path, error)
            engine.dispose()
            for leftover in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
                leftover.unlink(missing_ok=True)
            engine, fresh = _engine(path), True
            _create(engine)
        return cls(engine, fresh=fresh)

    async def run(self, work: Callable[[Session], Result]) -> Result:
        """`work` in one transaction: committed when it returns, rolled back when it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.run_now, work)

    def run_now(self, work: Callable[[Session], Result]) -> Result:
        """As `run`, for callers outside the loop."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            return work(session)

    def close(self) -> None:
        """Waits for the calls under way."""
        self._thread.shutdown()
        self._engine.dispose()


def _engine(path: Path) -> sqlalchemy.Engine:
    engine = sqlalchemy.create_engine(
        sqlalchemy.URL.create("sqlite", database=str(path)), connect_args={"timeout": 30}
    )
    event.listen(engine, "connect", _prepare_connection)
    return engine


def _prepare_connection(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # The files are the truth: losing the last rows in a power cut costs a re-read, not data.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _layout(engine: sqlalchemy.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("PRAGMA user_version")).scalar_one())


def _create(engine: sqlalchemy.Engine) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text(f"PRAGMA user_version={_LAYOUT}"))
