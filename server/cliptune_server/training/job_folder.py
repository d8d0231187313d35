"""A job's folder: what was accepted, and where its log, journal, lock and exported model are.

Enters: the header and spec of a new job. Leaves: the same after a restart, paths, whether a trainer lives
in it. Called by `jobs.py`, `launcher.py` and what reads the journal. Everything here blocks: callers use a
thread.

    job.json        header: id, creation, the link's secret, trace (0600)
    spec.json       the JobSpec as accepted
    events.jsonl    public events, written by the daemon only
    journal/        0000.jsonl preparation, 0001.jsonl first attempt …, written by the trainer only
    trainer.lock    flock held by the living trainer; its JSON tells which launch that is
    trainer.log     what the trainer printed
    checkpoints/    export/    pictures/    study/    report/
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf import json_format

from cliptune.durable import sync
from cliptune.v1 import spec_pb2
from cliptune_server.home import write_json

_LOG_END_BYTES: Final = 4_000
_LOG_END_LINES: Final = 20
_PICTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\.png")
STUDY_FILES: Final = ("best.toml", "trials.csv", "study.html")
"""What a study leaves for people."""
REPORT_FILES: Final = ("report.html", "report.json")
"""What a job that has succeeded leaves for people and for programs."""
_NAMED: Final = {"study": STUDY_FILES, "report": REPORT_FILES}


class CorruptJobError(Exception):
    """A job's folder lacks a file that every job has, or one cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobHeader:
    """What the daemon knows of a job besides its spec."""

    id: str
    created_ns: int
    """UTC, since 1970."""
    secret: str = field(repr=False)
    """Proves a trainer to the link."""
    idempotency_key: str = ""
    validate_only: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)
    """TRACEPARENT and TRACESTATE of the span that created the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchNote:
    """Which trainer has the lock, or had it last."""

    mode: str
    """"prepare" or "run"."""
    attempt: int
    pid: int = 0
    """0 until the process has started."""
    journal_bytes: int = 0
    """Size of the attempt's journal before the launch: lines above it belong to an earlier one."""


class JobFolder:
    """Paths and small files of one job."""

    def __init__(self, root: Path) -> None:
        self.root: Final = root

    @property
    def id(self) -> str:
        """The job's."""
        return self.root.name

    @property
    def events_path(self) -> Path:
        """The public log."""
        return self.root / "events.jsonl"

    @property
    def lock_path(self) -> Path:
        """Held by the living trainer."""
        return self.root / "trainer.lock"

    @property
    def log_path(self) -> Path:
        """What the trainer printed."""
        return self.root / "trainer.log"

    def journal_path(self, attempt: int) -> Path:
        """One file an attempt; 0 is preparation."""
        return self.root / "journal" / f"{attempt:04d}.jsonl"

    def export_path(self, relative: str) -> Path:
        """The exported model, named by the trainer relative to the folder."""
        return self.root / (relative or "export")

    def artifact(self, kind: str, name: str) -> bytes | None:
        """A file that the trainer has left for people; None: there is none of this name.

        "pictures": any PNG. "study": `STUDY_FILES`. "report": `REPORT_FILES`.
        """
        named = _PICTURE.fullmatch(name) is not None if kind == "pictures" else name in _NAMED.get(kind, ())
        if not named:
            return None
        try:
            descriptor = os.open(self.root / kind / name, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # gone, or a link, which the trainer never makes
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    @classmethod
    def create(cls, jobs_dir: Path, header: JobHeader, spec: spec_pb2.JobSpec) -> JobFolder:
        """Makes the folder of a new job; a crash leaves the whole of it or a hidden leftover."""
        hidden = jobs_dir / f".new-{header.id}"
        hidden.mkdir(mode=0o700)
        try:
            (hidden / "journal").mkdir()
            write_json(hidden / "job.json", asdict(header))
            write_json(
                hidden / "spec.json", json_format.MessageToDict(spec, preserving_proto_field_name=True)
            )
            hidden.rename(jobs_dir / header.id)
        except OSError:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        sync(jobs_dir)
        return cls(jobs_dir / header.id)

    def load(self) -> tuple[JobHeader, spec_pb2.JobSpec]:
        """What was accepted. `CorruptJobError` when that cannot be read."""
        try:
            header = JobHeader(**json.loads((self.root / "job.json").read_text("utf-8")))
            spec = json_format.Parse(
                (self.root / "spec.json").read_text("utf-8"), spec_pb2.JobSpec(), ignore_unknown_fields=True
            )
        except (OSError, ValueError, TypeError, json_format.ParseError) as error:
            raise CorruptJobError(f"{self.root}: {error}") from error
        if header.id != self.id:
            raise CorruptJobError(f"{self.root} holds the job {header.id}")
        return header, spec

    def remove(self) -> None:
        """Deletes the folder; a crash leaves the whole of it or a hidden leftover."""
        gone = self.root.with_name(f".gone-{self.id}")
        self.root.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def launch_note(self) -> LaunchNote | None:
        """The newest launch. None: there was none."""
        try:
            return LaunchNote(**json.loads(self.lock_path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def has_trainer(self) -> bool:
        """Whether a trainer lives in this folder, whoever started it."""
        try:
            descriptor = os.open(self.lock_path, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def journal_bytes(self, attempt: int) -> int:
        """Size of an attempt's journal."""
        try:
            return self.journal_path(attempt).stat().st_size
        except FileNotFoundError:
            return 0

    def log_end(self) -> str:
        """The last lines that the trainer printed."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END_BYTES))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-_LOG_END_LINES:])


def new_header(
    name: str, *, idempotency_key: str, validate_only: bool, trace: Mapping[str, str]
) -> JobHeader:
    """The header of a new job: its id is its name and eight random digits, its secret 256 random bits."""
    slug = name.strip(".-_")[:64] or "job"
    return JobHeader(
        id=f"{slug}-{secrets.token_hex(4)}",
        created_ns=time.time_ns(),
        secret=secrets.token_hex(32),
        idempotency_key=idempotency_key,
        validate_only=validate_only,
        trace=trace,
    )


def sweep(jobs_dir: Path) -> list[JobFolder]:
    """Removes the leftovers of crashes and lists the folders of jobs."""
    folders = []
    for path in sorted(jobs_dir.iterdir()):
        if path.name.startswith((".new-", ".gone-")):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and not path.name.startswith("."):
            folders.append(JobFolder(path))
    return folders
