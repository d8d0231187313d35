"""Live progress on a terminal, with rich: a bar for bulk embedding or an upload, a panel for a job.

rich is imported when something is shown, so that the client stays light. Everything goes to stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from cliptune.evaluation import Evaluation
from cliptune.job import JobEvent, JobPlan, Progress, StateChange
from cliptune.lines import describe

if TYPE_CHECKING:
    from rich.progress import TaskID


@contextmanager
def bulk_bar(kind: str, items: object, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar over `items` (of known length or not); gives the function that counts one item."""
    if not shown:
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"embedding {kind}", total=len(items) if isinstance(items, Sized) else None)
        yield lambda: bar.advance(task)


@contextmanager
def transfer_bar(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over bytes; gives the function that takes what is done, bytes so far and bytes in all."""
    if not shown:
        yield _nothing_moved
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield told


class JobDisplay:
    """One job on a terminal: a bar of steps with the newest numbers, other events as lines above it.

    Use it in a `with` block and `show` it every event.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console: Final = Console(stderr=True)
        self._bar: Final = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task: TaskID = self._bar.add_task("waiting", total=None, numbers="")

    def show(self, event: JobEvent) -> None:
        """Take one event."""
        body = event.body
        if isinstance(body, Progress):
            self._bar.update(
                self._task,
                description="training",
                completed=body.step,
                total=body.total_steps,
                numbers=progress_numbers(body),
            )
            return
        if isinstance(body, StateChange):
            self._bar.update(self._task, description=body.state.lower())
        if isinstance(body, JobPlan):
            self._bar.update(self._task, total=body.total_steps or None)
        style = "bold" if isinstance(body, StateChange | Evaluation) else None
        for line in describe(event):
            self._console.print(line, style=style, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def progress_numbers(progress: Progress) -> str:
    """The newest numbers, short."""
    eta = f" · {_duration(progress.eta_seconds)} left" if progress.eta_seconds > 0 else ""
    return (
        f"{progress.step}/{progress.total_steps} · loss {progress.loss:.4f} · lr {progress.learning_rate:.2e}"
        f" · {progress.samples_per_second:.0f} samples/s{eta}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _nothing() -> None:
    """Nothing is shown."""


def _nothing_moved(what: str, done: int, total: int) -> None:
    """Nothing is shown."""
