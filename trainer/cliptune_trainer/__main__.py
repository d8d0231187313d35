"""The trainer's process: `python -m cliptune_trainer prepare|run --job-dir D --attempt N ...`.

Enters: arguments and environment from the launcher (`CLIPTUNE_LINK_SECRET`, `TRACEPARENT`, `OTEL_*`).
Leaves: a journal that ends with how it went; exit status 0 if it does, 1 after a crash. Composes logging,
traces, journal, link and signals around preparation or a run.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from opentelemetry import context

from cliptune.errors import CliptuneError, InternalError
from cliptune.internal.v1 import trainer_pb2
from cliptune.telemetry import configure_logging, configure_tracing
from cliptune.tracing import extract_environment, tracer
from cliptune_model.machine.hardware import host
from cliptune_model.machine.policy import prepare_process
from cliptune_trainer.job import JobFolder
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import JournalHandler, Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.reporting.link import Link

_log = logging.getLogger("cliptune_trainer")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one attempt. Returns the exit status."""
    arguments = _parse(argv)
    inbox = Inbox()
    if arguments.task == "run":
        # Before torch is imported, which takes seconds.
        inbox.suspend_on_signals()
    configure_logging(os.environ.get("CLIPTUNE_LOG_LEVEL", "info"), "cliptune-trainer")
    if not _hold_lock(arguments.job_dir, arguments.lock_fd):
        _log.error("another trainer is at work in %s", arguments.job_dir)
        return 1
    end_tracing = configure_tracing("cliptune-trainer")
    parent = context.attach(extract_environment(os.environ))
    try:
        with tracer().start_as_current_span(
            f"job.{arguments.task}", attributes={"attempt": arguments.attempt}
        ) as span:
            status = _attempt(arguments, inbox)
            span.set_attribute("exit_status", status)
            return status
    finally:
        context.detach(parent)
        end_tracing()


def _attempt(arguments: argparse.Namespace, inbox: Inbox) -> int:
    # Heavy imports wait until signals mean something.
    import structlog

    job = JobFolder(arguments.job_dir)
    structlog.contextvars.bind_contextvars(job_id=job.job_id)
    journal = Journal(job.journal(arguments.attempt), arguments.attempt)
    reporter = Reporter(journal)
    handler = JournalHandler(reporter)
    logging.getLogger().addHandler(handler)
    link = None
    if arguments.link:
        secret = os.environ.get("CLIPTUNE_LINK_SECRET", "")
        link = Link(arguments.link, job_id=job.job_id, secret=secret, journal=journal, inbox=inbox)
        link.start()
    try:
        if arguments.task == "prepare":
            _prepare(job, arguments.data_root, reporter)
        else:
            _run(job, arguments.data_root, reporter, inbox, linked=link is not None)
        return 0 if journal.pending == 0 else 1
    except Exception:
        _log.exception("the trainer crashed")
        return 1
    finally:
        logging.getLogger().removeHandler(handler)
        if link is not None:
            link.close()
        journal.close()


def _prepare(job: JobFolder, roots: Sequence[Path], reporter: Reporter) -> None:
    """Every failure is final: the same spec would fail again."""
    try:
        from cliptune_trainer.preflight import prepare

        prepare(job, roots, reporter)
    except CliptuneError as error:
        reporter.finished(trainer_pb2.OUTCOME_FAILED, error)
    except Exception as error:
        _log.exception("preparation crashed")
        reporter.finished(trainer_pb2.OUTCOME_FAILED, InternalError(f"{type(error).__name__}: {error}"))
    else:
        reporter.finished(trainer_pb2.OUTCOME_PREPARED)


def _run(job: JobFolder, roots: Sequence[Path], reporter: Reporter, inbox: Inbox, *, linked: bool) -> None:
    """What is wrong with the job ends it; a crash is left to the caller, and to the daemon's retries."""
    try:
        if job.message().HasField("tune"):
            from cliptune_trainer.tuning.runner import run_study

            ending = run_study(job, reporter, inbox)
        else:
            # Read by torch at its first use of the device.
            prepare_process("auto", host())
            from cliptune_trainer.training.run import run

            ending = run(job, roots, reporter, inbox, linked=linked)
    except CliptuneError as error:
        reporter.finished(trainer_pb2.OUTCOME_FAILED, error)
    else:
        reporter.finished(ending.outcome, export_path=ending.export_path)


def _hold_lock(job_dir: Path, descriptor: int | None) -> bool:
    """The lock says that a trainer lives. Handed over held by a launcher; taken here when started by hand."""
    if descriptor is not None:
        # Loader processes must not keep it when the trainer is gone.
        os.set_inheritable(descriptor, False)
        return True
    descriptor = os.open(job_dir / "trainer.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cliptune_trainer", description="Prepare or run one job of a cliptune daemon."
    )
    parser.add_argument("task", choices=("prepare", "run"))
    parser.add_argument("--job-dir", type=Path, required=True, help="folder with spec.json")
    parser.add_argument("--attempt", type=int, required=True, help="0 for prepare; from 1 on for run")
    parser.add_argument("--link", default="", help="the daemon's link, unix:PATH; none: train alone")
    parser.add_argument("--lock-fd", type=int, help="descriptor of trainer.lock, held by the launcher")
    parser.add_argument(
        "--data-root",
        type=Path,
        action="append",
        default=[],
        help="a folder that may be read; may be repeated",
    )
    arguments = parser.parse_args(argv)
    arguments.job_dir = arguments.job_dir.resolve()
    return arguments


if __name__ == "__main__":
    sys.exit(main())
