"""Starts trainer processes and finds those that another daemon started.

Enters: a `LaunchOrder`. Leaves: a `Trainer` to wait for, to ask to leave, to kill. Called by `jobs.py`
through the `Launcher` protocol, the seam for launchers on other machines.

Whether a trainer lives is told by a lock, not by a process id: the launcher takes `trainer.lock`, hands the
open descriptor to the child and closes its own, so the lock is held from before the child's first
instruction exactly until its end. A blocking flock in a thread waits for that end, whoever the parent was.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from cliptune.errors import ConflictError
from cliptune_server.compute_environment import compute_environment
from cliptune_server.training.job_folder import JobFolder, LaunchNote

log = logging.getLogger(__name__)

# Between letting go of the lock and the end of the process there is only the interpreter's own end.
_LINGER_S: Final = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOrder:
    """What to start."""

    folder: JobFolder
    note: LaunchNote
    """Which launch it is."""
    link_address: str
    """"unix:PATH"."""
    secret: str = field(repr=False)
    data_roots: tuple[Path, ...] = ()
    trace: Mapping[str, str] = field(default_factory=dict)
    """TRACEPARENT and TRACESTATE: what the trainer's spans belong under."""


class Trainer(Protocol):
    """A trainer process."""

    @property
    def note(self) -> LaunchNote:
        """Which launch this is."""
        ...

    async def ended(self) -> str:
        """Waits for its end and tells how that came, for a person."""
        ...

    def suspend(self) -> None:
        """Asks it to checkpoint and leave."""
        ...

    def kill(self) -> None:
        """Ends it and its loader processes at once."""
        ...


class Launcher(Protocol):
    """Where trainers run."""

    def launch(self, order: LaunchOrder) -> Trainer:
        """Starts a trainer. Blocks for a moment. `ConflictError` when one lives in the folder."""
        ...

    def find(self, folder: JobFolder) -> Trainer | None:
        """The living trainer of a folder, whoever started it. Blocks for a moment."""
        ...


class LocalLauncher:
    """Trainers as processes of this machine, each in a session of its own: they outlive the daemon."""

    def __init__(
        self,
        command: tuple[str, ...] = (sys.executable, "-m", "cliptune_trainer"),
        *,
        code_folders: tuple[Path, ...] = (),
    ) -> None:
        self._command = command
        self._code_folders = code_folders

    def launch(self, order: LaunchOrder) -> LocalTrainer:
        """Starts `command prepare|run …` with the lock in its hands."""
        folder = order.folder
        lock_fd = os.open(folder.lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConflictError(f"a trainer of the job {folder.id} still lives") from None
            _write_note(lock_fd, order.note)
            with folder.log_path.open("ab") as output:
                process = subprocess.Popen(
                    [*self._command, *_arguments(order, lock_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock_fd,),
                    start_new_session=True,
                    cwd=folder.root,
                    env=_environment(order, self._code_folders),
                )
            note = replace(order.note, pid=process.pid)
            _write_note(lock_fd, note)
        finally:
            os.close(lock_fd)
        return LocalTrainer(folder, note, process)

    def find(self, folder: JobFolder) -> LocalTrainer | None:
        """A trainer that holds the folder's lock."""
        note = folder.launch_note()
        if note is None or not folder.has_trainer():
            return None
        return LocalTrainer(folder, note, None)


class LocalTrainer:
    """A trainer process of this machine, our child or not."""

    def __init__(self, folder: JobFolder, note: LaunchNote, process: subprocess.Popen[bytes] | None) -> None:
        self.note: Final = note
        self._folder = folder
        self._process = process

    async def ended(self) -> str:
        """Waits until the lock is free."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[str] = loop.create_future()

        def settle(how: str) -> None:
            if not end.done():
                end.set_result(how)

        def wait() -> None:
            how = self._wait()
            # The loop is gone when the daemon stopped before its trainer.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, how)

        # Not from a pool: a pool's threads are joined at exit, and this one may wait for hours.
        threading.Thread(target=wait, name=f"waits for {self._folder.id}", daemon=True).start()
        return await end

    def suspend(self) -> None:
        """SIGTERM to the trainer itself."""
        self._signal(signal.SIGTERM, group=False)

    def kill(self) -> None:
        """SIGKILL to its whole session."""
        self._signal(signal.SIGKILL, group=True)

    def _signal(self, number: signal.Signals, *, group: bool) -> None:
        # The id is the trainer's own as long as the lock is held, however many processes came and went since.
        if not self.note.pid or not self._folder.has_trainer():
            return
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.note.pid, number)

    def _wait(self) -> str:
        descriptor = os.open(self._folder.lock_path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)
        if self._process is None:
            return "ended under an earlier daemon or apart from this one"
        try:
            status = self._process.wait(_LINGER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"killed by {_signal_name(-status)}" if status < 0 else f"ended with exit status {status}"


def _arguments(order: LaunchOrder, lock_fd: int) -> list[str]:
    arguments = [
        order.note.mode,
        "--job-dir",
        str(order.folder.root),
        "--attempt",
        str(order.note.attempt),
        "--link",
        order.link_address,
        "--lock-fd",
        str(lock_fd),
    ]
    for root in order.data_roots:
        arguments += ["--data-root", str(root)]
    return arguments


def _environment(order: LaunchOrder, code_folders: tuple[Path, ...]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRACEPARENT", "TRACESTATE")}
    return {**compute_environment(kept, code_folders), **order.trace, "CLIPTUNE_LINK_SECRET": order.secret}


def _write_note(lock_fd: int, note: LaunchNote) -> None:
    text = json.dumps(asdict(note)).encode()
    os.pwrite(lock_fd, text, 0)
    os.ftruncate(lock_fd, len(text))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
