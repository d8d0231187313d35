"""Everything the trainer says: typed events into the journal, milestones also into the log.

Enters: plain values. Leaves: journaled `JobEvent`s. Called by the loop and by preparation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from cliptune.errors import CliptuneError, to_detail
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_trainer.reporting.journal import Journal

_log: Final = logging.getLogger("cliptune_trainer")
_MAX_MESSAGE_CHARS: Final = 4000


class Reporter:
    """Writes events of one attempt."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def plan(self, plan: job_pb2.JobPlan) -> None:
        """What preparation found out."""
        self._journal.append(job_pb2.JobEvent(plan=plan))

    def progress(self, progress: job_pb2.Progress) -> None:
        """After a step."""
        self._journal.append(job_pb2.JobEvent(progress=progress))

    def evaluation(self, evaluation: job_pb2.Evaluation) -> None:
        """What was measured at a step."""
        self._journal.append(job_pb2.JobEvent(evaluation=evaluation))

    def trial(
        self,
        number: int,
        job_id: str,
        settings: Mapping[str, str],
        *,
        outcome: str,
        value: float | None,
        best: bool,
        error: CliptuneError | None,
    ) -> None:
        """A study's trial has ended; see `TrialDone`."""
        done = job_pb2.TrialDone(
            number=number, job_id=job_id, settings=settings, outcome=outcome, value=value, best=best
        )
        if error is not None:
            done.error.CopyFrom(to_detail(error))
        self._journal.append(job_pb2.JobEvent(trial=done))

    def checkpoint(self, step: int, size_bytes: int) -> None:
        """A checkpoint is whole on disk."""
        self._journal.append(
            job_pb2.JobEvent(checkpoint=job_pb2.CheckpointSaved(step=step, bytes=size_bytes))
        )

    def notice(self, code: str, message: str, *, warning: bool = True) -> None:
        """Something that the user should know."""
        severity = job_pb2.SEVERITY_WARNING if warning else job_pb2.SEVERITY_INFO
        # The notice is an event already; as a log line it only goes to stderr.
        _log.log(logging.WARNING if warning else logging.INFO, message, extra={"code": code, _SAID: True})
        self._journal.append(
            job_pb2.JobEvent(notice=job_pb2.Notice(severity=severity, code=code, message=message))
        )

    def milestone(self, message: str) -> None:
        """A line of the log that the user's view of the job shows too."""
        _log.info(message, extra={_SAID: True})
        self.log_line("info", message)

    def log_line(self, level: str, message: str) -> None:
        """A line of the log."""
        line = job_pb2.LogLine(level=level, message=message[:_MAX_MESSAGE_CHARS])
        self._journal.append(job_pb2.JobEvent(log=line))

    def command_done(self, command_id: str, command: str, error: CliptuneError | None = None) -> None:
        """A command was carried out, or could not be."""
        done = job_pb2.CommandDone(command_id=command_id, command=command)
        if error is not None:
            done.error.CopyFrom(to_detail(error))
        self._journal.append(job_pb2.JobEvent(command=done), regardless=self._journal.pending > 0)

    def state(
        self, state: job_pb2.JobState.ValueType, reason: str, error: CliptuneError | None = None
    ) -> None:
        """A state that only the trainer knows of: held by a full disk, or going on after it."""
        change = job_pb2.StateChange(state=state, reason=reason)
        if error is not None:
            change.error.CopyFrom(to_detail(error))
        self._journal.append(job_pb2.JobEvent(state=change), regardless=True)

    def finished(
        self,
        outcome: trainer_pb2.Outcome.ValueType,
        error: CliptuneError | None = None,
        export_path: str = "",
    ) -> None:
        """The last word of the attempt."""
        finished = trainer_pb2.Finished(outcome=outcome, export_path=export_path)
        if error is not None:
            finished.error.CopyFrom(to_detail(error))
        self._journal.append(finished, regardless=True)


class JournalHandler(logging.Handler):
    """Puts warnings and errors of any library into the journal."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record's message, unless it is an event already."""
        # open_clip talks through the root logger; that goes to stderr only.
        if getattr(record, _SAID, False) or record.name == "root":
            return
        message = record.msg.get("event", "") if isinstance(record.msg, dict) else record.getMessage()
        try:
            self._reporter.log_line(record.levelname.lower(), str(message))
        except OSError:
            self.handleError(record)


_SAID: Final = "is_event"
