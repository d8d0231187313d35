"""When the disk is full: keep everything in memory and wait for a word.

Enters: what could not be written. Leaves: None once it is written, or how the attempt ends. Called by the
loop. The process stays, holding weights and optimizer; the job is shown as paused, with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from cliptune.durable import is_disk_full
from cliptune.errors import CliptuneError, DiskFullError, JobStateError
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_trainer.reporting.commands import Inbox, command_name
from cliptune_trainer.reporting.events import Reporter

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How an attempt ended by its own will. `export_path` is relative to the job's folder."""

    outcome: trainer_pb2.Outcome.ValueType
    export_path: str = ""


def attempt_write(write: Callable[[], None]) -> DiskFullError | None:
    """Runs `write`; a full disk is returned, every other failure raised."""
    try:
        write()
    except Exception as error:
        if not is_disk_full(error):
            raise
        return error if isinstance(error, DiskFullError) else DiskFullError(f"the disk is full: {error}")
    return None


def hold(
    inbox: Inbox,
    reporter: Reporter,
    error: DiskFullError,
    *,
    write: Callable[[], None],
    save: Callable[[], None],
) -> Ending | None:
    """Says that the job is paused, and waits.

    Args:
        inbox: where the word comes from.
        reporter: where it is answered.
        error: of the first try.
        write: what failed; `resume` tries it again.
        save: writes a checkpoint; `pause` and a stopping daemon try it once more.

    Returns:
        None after a `resume` that could write; otherwise the attempt's end.
    """
    reason = f"{error.message}; make room and resume: nothing is lost"
    reporter.state(job_pb2.JOB_STATE_PAUSED, reason, error)
    while True:
        instruction = inbox.wait()
        name = command_name(instruction)
        answer: CliptuneError | None = None
        ending: Ending | None = None
        if name == "cancel":
            ending = Ending(outcome=trainer_pb2.OUTCOME_CANCELLED)
        elif name == "suspend":
            if attempt_write(save) is not None:
                _log.warning(
                    "still no room for a checkpoint: the steps since the last one are repeated later"
                )
            return Ending(outcome=trainer_pb2.OUTCOME_SUSPENDED)
        elif name == "pause":
            answer = attempt_write(save)
            ending = Ending(outcome=trainer_pb2.OUTCOME_PAUSED) if answer is None else None
        elif name == "resume":
            answer = attempt_write(write)
            if answer is None:
                reporter.state(job_pb2.JOB_STATE_RUNNING, "there is room on the disk again")
                reporter.command_done(instruction.command_id, name)
                return None
        else:
            answer = JobStateError(f"the job is PAUSED: {error.message}", state="PAUSED")
        reporter.command_done(instruction.command_id, name, answer)
        if ending is not None:
            return ending
