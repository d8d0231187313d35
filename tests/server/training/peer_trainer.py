"""A trainer without torch: speaks the launcher's, the journal's and the link's protocol, and counts steps.

Started by `LocalLauncher` like the real one, with the real one's journal and link. What it does follows from
the spec: `train.max_steps` steps of about 5 ms; the name says how it misbehaves ("crashes": dies at step 3 of
every attempt; "lingers": says yes to a pause and stays until it is told something else). A checkpoint is the
number of the step, in a file.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from google.protobuf import json_format

from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2, spec_pb2
from cliptune_trainer.reporting.commands import Inbox, command_name
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.reporting.link import Link

STEP_S = 0.005


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("--job-dir", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--link")
    parser.add_argument("--lock-fd", type=int)
    parser.add_argument("--data-root", action="append")
    arguments = parser.parse_args()
    inbox = Inbox()
    inbox.suspend_on_signals()
    folder: Path = arguments.job_dir
    spec = json_format.Parse((folder / "spec.json").read_text(), spec_pb2.JobSpec())
    journal = Journal(folder / "journal" / f"{arguments.attempt:04d}.jsonl", arguments.attempt)
    link = Link(
        arguments.link,
        job_id=folder.name,
        secret=os.environ["CLIPTUNE_LINK_SECRET"],
        journal=journal,
        inbox=inbox,
    )
    link.start()
    print(f"{arguments.task} attempt {arguments.attempt}", flush=True)
    if arguments.task == "prepare":
        plan = job_pb2.JobPlan(device=spec.resources.device or "cpu", total_steps=spec.train.max_steps)
        journal.append(job_pb2.JobEvent(plan=plan))
        outcome = trainer_pb2.OUTCOME_PREPARED
    else:
        outcome = train(spec, folder, journal, inbox)
    journal.append(trainer_pb2.Finished(outcome=outcome, export_path="export"))
    link.close()
    journal.close()
    return 0


def train(
    spec: spec_pb2.JobSpec, folder: Path, journal: Journal, inbox: Inbox
) -> trainer_pb2.Outcome.ValueType:
    saved = folder / "checkpoints" / "step"
    saved.parent.mkdir(exist_ok=True)
    step = int(saved.read_text()) if saved.exists() else 0

    def checkpoint() -> None:
        saved.write_text(str(step))
        journal.append(job_pb2.JobEvent(checkpoint=job_pb2.CheckpointSaved(step=step, bytes=1)))

    while step < spec.train.max_steps:
        step += 1
        progress = job_pb2.Progress(step=step, total_steps=spec.train.max_steps, loss=1 / step)
        journal.append(job_pb2.JobEvent(progress=progress))
        if spec.name == "crashes" and step % 3 == 0:
            print(f"dies at step {step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if (instruction := inbox.next(STEP_S)) is None:
            continue
        name = command_name(instruction)
        if not instruction.command_id and name == "yield_to_inference":  # the daemon's own doing
            told = job_pb2.LogLine(message=f"yields {instruction.command.yield_to_inference.seconds:g} s")
            journal.append(job_pb2.JobEvent(log=told))
            continue
        if name in ("pause", "suspend", "checkpoint"):
            checkpoint()
        if name != "suspend":
            done = job_pb2.CommandDone(command_id=instruction.command_id, command=name)
            journal.append(job_pb2.JobEvent(command=done))
        match name:
            case "pause":
                if spec.name == "lingers":
                    inbox.wait()
                return trainer_pb2.OUTCOME_PAUSED
            case "suspend":
                return trainer_pb2.OUTCOME_SUSPENDED
            case "cancel":
                return trainer_pb2.OUTCOME_CANCELLED
    (folder / "export").mkdir(exist_ok=True)
    return trainer_pb2.OUTCOME_SUCCEEDED


if __name__ == "__main__":
    sys.exit(main())
