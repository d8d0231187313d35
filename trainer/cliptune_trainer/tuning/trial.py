"""A trial as a job of the daemon: submitted once, followed to its end by a thread of its own.

Enters: a spec and a key that makes submitting it twice one job. Leaves: what happens to it, by callbacks.
Called by the runner. The daemon may go and come back, elsewhere even: the trial is then found again by its
key, and its events go on after the last one seen.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cliptune.address import find_address
from cliptune.client import Client
from cliptune.errors import CliptuneError, ConflictError, NotFoundError, UnavailableError
from cliptune.job import JobEvent, JobState
from cliptune.v1 import spec_pb2

_log: Final = logging.getLogger(__name__)
# Between two tries to reach a daemon that is away; it may come back at another address.
_RETRY_S: Final = 0.5
_RECONNECT_S: Final = 2.0


class TrialJob:
    """One trial's job.

    Args:
        home: of the daemon.
        spec: what it runs.
        key: the same for the same trial, whoever submits it.
        on_submitted: called from the trial's thread with the job's id.
        on_event: likewise with each event, once and in order.
        on_refused: likewise, instead of any further event, when the daemon will not have it.
    """

    def __init__(
        self,
        home: Path,
        spec: spec_pb2.JobSpec,
        key: str,
        *,
        on_submitted: Callable[[str], None],
        on_event: Callable[[JobEvent], None],
        on_refused: Callable[[CliptuneError], None],
    ) -> None:
        self._home, self._spec, self._key = home, spec, key
        self._on_submitted, self._on_event, self._on_refused = on_submitted, on_event, on_refused
        self._after = 0
        self._leaving = threading.Event()
        self._cancelled = threading.Event()
        self._job_id = ""

    def start(self) -> None:
        """Submits it, or finds it again."""
        # A daemon thread: a study that is told to leave does not wait for its trials.
        threading.Thread(target=self._follow, name=self._spec.name, daemon=True).start()

    def leave(self) -> None:
        """No further event is told; the job goes on by itself."""
        self._leaving.set()

    def cancel(self) -> None:
        """Asks for the job's end, without waiting for it; its events tell of it."""
        self._cancelled.set()
        if self._job_id:
            threading.Thread(target=self._cancel, name=f"cancels {self._spec.name}", daemon=True).start()

    def pause(self) -> None:
        """The job leaves its device until the study is taken up again."""
        try:
            if self._job_id:
                with self._client() as client:
                    client.pause_job(self._job_id)
        except (ConflictError, NotFoundError, UnavailableError) as error:
            _log.info("%s goes on: %s", self._spec.name, error)  # it is being prepared, or has ended

    def _cancel(self) -> None:
        try:
            with self._client() as client:
                client.cancel_job(self._job_id)
        except (ConflictError, NotFoundError, UnavailableError) as error:
            _log.info("%s is not cancelled: %s", self._spec.name, error)  # it has ended by itself

    def _client(self) -> Client:
        return Client(find_address({"CLIPTUNE_HOME": str(self._home)}))

    def _follow(self) -> None:
        while not self._leaving.is_set():
            try:
                with self._client() as client:
                    job = client.create_job(self._spec, idempotency_key=self._key)
                    self._job_id = job.id
                    self._on_submitted(job.id)
                    if self._cancelled.is_set() and not job.state.final:
                        client.cancel_job(job.id)
                    elif job.state == JobState.PAUSED:
                        client.resume_job(job.id)
                    for event in client.watch_job(job.id, after=self._after, reconnect_s=_RECONNECT_S):
                        if self._leaving.is_set():
                            return
                        self._after = event.number
                        self._on_event(event)
                    return
            except (ConflictError, UnavailableError):  # it ended just before it was told to; or no daemon
                self._leaving.wait(_RETRY_S)
            except CliptuneError as error:
                self._on_refused(error)
                return
