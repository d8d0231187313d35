"""A job's folder on disk, and real trainer processes at work in it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from cliptune.internal.v1 import trainer_pb2
from cliptune_trainer.job import JobFolder

TIMEOUT_S = 120


class TrainerJob:
    """`spec` is the JSON form of a JobSpec; the data lies in `root`."""

    def __init__(self, path: Path, root: Path, spec: dict[str, Any]) -> None:
        path.mkdir(parents=True)
        self.path, self.root = path, root
        (path / "spec.json").write_text(json.dumps(spec))
        self.folder = JobFolder(path)
        self._processes: list[subprocess.Popen[bytes]] = []

    def copied(self, path: Path) -> TrainerJob:
        """Another job that has come as far as this one."""
        shutil.copytree(self.path, path)
        other = copy.copy(self)
        other.path, other.folder, other._processes = path, JobFolder(path), []
        return other

    def forget(self, part: str, field: str) -> None:
        """Leaves a field of the spec to its default."""
        spec = json.loads((self.path / "spec.json").read_text())
        spec[part].pop(field, None)
        (self.path / "spec.json").write_text(json.dumps(spec))

    def start(
        self, task: str, attempt: int, *, link: str = "", env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts `python -m cliptune_trainer`, its output going to `trainer.log`."""
        command = [sys.executable, "-m", "cliptune_trainer", task, "--job-dir", str(self.path)]
        command += ["--attempt", str(attempt), "--data-root", str(self.root)]
        if link:
            command += ["--link", link]
        with (self.path / "trainer.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CLIPTUNE_LINK_SECRET": "secret", **(env or {})},
            )
        self._processes.append(process)
        return process

    def end(self) -> None:
        """Leaves no process behind, whatever became of the test."""
        for process in self._processes:
            process.kill()
            process.wait(TIMEOUT_S)

    def run(self, task: str, attempt: int, *, env: dict[str, str] | None = None) -> None:
        """Runs it to its end, alone."""
        assert self.start(task, attempt, env=env).wait(TIMEOUT_S) == 0, self.log

    @property
    def log(self) -> str:
        return (self.path / "trainer.log").read_text()

    def journal(self, attempt: int) -> list[trainer_pb2.TrainerEvent]:
        lines = self.folder.journal(attempt).read_text().splitlines()
        return [json_format.Parse(line, trainer_pb2.TrainerEvent()) for line in lines]

    def losses(self, attempt: int) -> dict[int, tuple[float, float, float]]:
        """Step → loss, gradient norm and logit scale, as exact as they were journaled."""
        return {
            event.event.progress.step: (
                event.event.progress.loss,
                event.event.progress.gradient_norm,
                event.event.progress.logit_scale,
            )
            for event in self.journal(attempt)
            if event.event.HasField("progress")
        }

    def kinds(self, attempt: int) -> list[str]:
        """What each line of the journal is."""
        return [
            event.event.WhichOneof("body") or "" if event.HasField("event") else "finished"
            for event in self.journal(attempt)
        ]

    def outcome(self, attempt: int) -> trainer_pb2.Finished:
        last = self.journal(attempt)[-1]
        assert last.HasField("finished"), self.log
        return last.finished

    def notices(self, attempt: int) -> dict[str, str]:
        """Code → message."""
        return {
            event.event.notice.code: event.event.notice.message
            for event in self.journal(attempt)
            if event.event.HasField("notice")
        }
