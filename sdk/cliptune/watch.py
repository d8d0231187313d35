"""Where a watcher stands in a job's events: what to ask for next, what is new.

Pure: `Client.watch_job` and `AsyncClient.watch_job` carry the stream and do the waiting.
"""

from __future__ import annotations

from typing import Final

from cliptune.channel import Patience
from cliptune.errors import UnavailableError
from cliptune.job import JobEvent, event_from_message
from cliptune.v1 import training_pb2

METHOD: Final = "TrainingService/WatchJob"
DEFAULT_RECONNECT_S: Final = 120.0
# Before the daemon was heard of once, it is more likely not there than restarting.
_FIRST_CONTACT_S: Final = 5.0


class WatchCursor:
    """Follows one job: each event once, in order, over any number of connections."""

    def __init__(self, job_id: str, after: int, reconnect_s: float) -> None:
        self._job_id: Final = job_id
        self._after = after
        self._reconnect_s: Final = reconnect_s
        self._patience = Patience(limit_s=min(reconnect_s, _FIRST_CONTACT_S))
        self.ended = False

    def request(self) -> training_pb2.WatchJobRequest:
        """Ask for what has not been seen yet."""
        self._patience.opened()
        return training_pb2.WatchJobRequest(job_id=self._job_id, after_number=self._after)

    def accept(self, answer: training_pb2.WatchJobResponse) -> JobEvent | None:
        """The event, or None when it was seen before; `UnavailableError` when one before it is missing."""
        event = event_from_message(answer.event)
        if event.number <= self._after:
            return None
        if event.number > self._after + 1:
            raise UnavailableError(
                f"event {self._after + 1} of job {self._job_id} did not arrive before {event.number}"
            )
        self._after = event.number
        self._patience.limit_s = self._reconnect_s
        self._patience.heard()
        self.ended = event.final
        return event

    def wait_s(self, error: UnavailableError) -> float:
        """How long to wait before the stream is opened again; raises `error` after too long an absence."""
        return self._patience.wait_s(error)
