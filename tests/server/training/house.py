"""Real `Jobs` on a real home, in this process; trainers are real processes.

The publisher is the real registry with an engine that is never started, so publishing writes files and rows.
For the torch-free peer, whose export is empty, `FolderPublisher` only names the folder.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from cliptune.v1 import job_pb2, spec_pb2, training_pb2
from cliptune_server.config import JobsConfig
from cliptune_server.database import Database
from cliptune_server.datasets.stored import StoredDatasets
from cliptune_server.home import Home
from cliptune_server.training.jobs import Jobs
from cliptune_server.training.launcher import LocalLauncher
from cliptune_server.training.link import LinkService
from cliptune_server.training.publisher import Publication, Publisher

PEER = (sys.executable, str(Path(__file__).with_name("peer_trainer.py")))
LIMIT_S = 60.0

Predicate = Callable[[job_pb2.JobEvent], bool]


class FolderPublisher:
    """A registry of one folder: every job becomes version 1 of its name, served if `not_loaded` is empty."""

    def __init__(self, *, not_loaded: str = "") -> None:
        self.published: list[str] = []
        self._not_loaded = not_loaded

    async def publish(
        self, job_id: str, publish: spec_pb2.PublishSpec, export_dir: Path, metrics: Mapping[str, float]
    ) -> Publication:
        assert await asyncio.to_thread(export_dir.is_dir)
        self.published.append(job_id)
        model = job_pb2.ModelPublished(name=publish.model, version=1)
        return Publication(model=model, not_loaded=self._not_loaded)

    async def resolve_source(self, name: str) -> str:
        return name


@asynccontextmanager
async def open_jobs(
    root: Path,
    *,
    command: tuple[str, ...] = PEER,
    publisher: Publisher | None = None,
    grace_s: float = 20.0,
    cancel_grace_s: float = 60.0,
    settle_s: float = 60.0,
) -> AsyncIterator[Jobs]:
    """Jobs of the home root/home that may read `root`; stopped in order at the end."""
    with Home.open(root / "home") as home:
        database = Database.open(home.database_path)
        jobs = Jobs(
            home=home,
            database=database,
            launcher=LocalLauncher(command),
            link=LinkService(home.link_path()),
            publisher=publisher or FolderPublisher(),
            data_names=StoredDatasets(home.data_dir),
            config=JobsConfig(data_roots=(root,), cancel_grace_s=cancel_grace_s, settle_s=settle_s),
        )
        try:
            await jobs.start()
            yield jobs
        finally:
            await jobs.stop(grace_s)
            database.close()


def peer_spec(root: Path, name: str = "peer", *, steps: int = 20, device: str = "cpu") -> spec_pb2.JobSpec:
    """A job for the peer; its data file exists and is never read."""
    data = root / "data.csv"
    data.write_text("image,caption\n")
    spec = spec_pb2.JobSpec(name=name)
    spec.model.name = "cliptune-test-vit"
    spec.data.train = str(data)
    spec.train.max_steps = steps
    spec.resources.device = device
    return spec


async def create(jobs: Jobs, spec: spec_pb2.JobSpec, **fields: object) -> job_pb2.Job:
    return await jobs.create(training_pb2.CreateJobRequest(spec=spec, **fields))


async def collect(
    jobs: Jobs, job_id: str, *, after: int = 0, until: Predicate | None = None
) -> list[job_pb2.JobEvent]:
    """Events until one fulfils `until`, or all."""
    events: list[job_pb2.JobEvent] = []
    async with asyncio.timeout(LIMIT_S):
        stream = jobs.watch(job_id, after)
        try:
            async for event in stream:
                events.append(event)
                if until is not None and until(event):
                    break
        finally:
            await stream.aclose()
    return events


def in_state(state: job_pb2.JobState.ValueType) -> Predicate:
    return lambda event: event.WhichOneof("body") == "state" and event.state.state == state


def at_step(step: int, attempt: int = 1) -> Predicate:
    return lambda event: event.progress.step >= step and event.attempt >= attempt


def states(events: list[job_pb2.JobEvent]) -> list[str]:
    """The states that these events tell of, such as ["PREPARING", "QUEUED"]."""
    return [
        job_pb2.JobState.Name(event.state.state).removeprefix("JOB_STATE_")
        for event in events
        if event.WhichOneof("body") == "state"
    ]


def assert_gapless(events: list[job_pb2.JobEvent], first: int = 1) -> None:
    assert [event.number for event in events] == list(range(first, first + len(events)))
