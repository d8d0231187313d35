"""What survives a process: journal, checkpoints, the history of the learning rate."""

from __future__ import annotations

import errno
import json
import random
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cliptune.durable import is_disk_full, write_atomically
from cliptune.errors import DiskFullError
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.schedule import PeakHistory, Schedule
from cliptune_trainer.training.checkpoint import (
    CorruptCheckpointError,
    TrainingState,
    checkpoints,
    load_state,
    random_state,
    restore_random_state,
    save_checkpoint,
)

EVENT = job_pb2.JobEvent(log=job_pb2.LogLine(level="info", message="hello"))


def sequences(path: Path) -> list[int]:
    return [int(json.loads(line)["sequence"]) for line in path.read_text().splitlines()]


def test_a_journal_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal" / "0001.jsonl"
    journal = Journal(path, 1)
    for _ in range(3):
        journal.append(EVENT)
    journal.close()
    path.write_bytes(path.read_bytes()[:-5])
    journal = Journal(path, 1)
    told: list[trainer_pb2.TrainerEvent] = []
    assert journal.attach(told.append) == 2
    journal.append(trainer_pb2.Finished(outcome=trainer_pb2.OUTCOME_PREPARED))
    journal.close()
    assert sequences(path) == [1, 2, 3]
    assert [event.sequence for event in told] == [3]
    line = json.loads(path.read_text().splitlines()[-1])
    assert (line["attempt"], line["finished"]) == (1, {"outcome": "OUTCOME_PREPARED"})


def test_a_full_disk_keeps_lines_in_memory_and_tells_only_what_must_be_told(tmp_path: Path) -> None:
    path = tmp_path / "0001.jsonl"
    journal = Journal(path, 1)
    told: list[int] = []
    journal.attach(lambda event: told.append(event.sequence))
    journal.append(EVENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        journal.append(EVENT)
        assert (told, journal.pending) == ([1], 1)
        journal.append(EVENT, regardless=True)
        assert (told, journal.pending) == ([1, 2, 3], 2)
        assert sequences(path) == [1], "a torn line was left behind"
        # A daemon that comes now learns of them too.
        late: list[int] = []
        assert journal.attach(lambda event: late.append(event.sequence)) == 1
        assert late == [2, 3]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.append(EVENT)
    assert sequences(path) == [1, 2, 3, 4]
    assert late == [2, 3, 4]
    journal.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_in_all_its_forms(number: int) -> None:
    assert is_disk_full(OSError(number, "full"))
    assert is_disk_full(RuntimeError(f"I/O error: no room (os error {number})"))
    wrapped = DiskFullError("no space left")
    wrapped.__cause__ = OSError(number, "full")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    assert not is_disk_full(None)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def state(step: int) -> TrainingState:
    return TrainingState(step=step, counters={"bad_rows": [3]}, tensors={"optimizer/a/step": torch.ones(2)})


def test_the_newest_checkpoints_are_kept_and_the_others_removed(tmp_path: Path, clip: Clip) -> None:
    (tmp_path / ".partial-00000001").mkdir()
    for step in (1, 2, 3):
        assert save_checkpoint(tmp_path, clip, state(step), keep=2, job_id="job") > 1_000_000
    assert [entry.name for entry in checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    loaded = load_state(tmp_path / "step-00000003")
    assert (loaded.step, loaded.counters) == (3, {"bad_rows": [3]})
    assert torch.equal(loaded.tensors["optimizer/a/step"], torch.ones(2))


@pytest.mark.parametrize(
    "name", ["model/open_clip_model.safetensors", "training.safetensors", "training.json"]
)
def test_a_torn_or_altered_checkpoint_is_noticed(tmp_path: Path, clip: Clip, name: str) -> None:
    save_checkpoint(tmp_path, clip, state(1), keep=2, job_id="job")
    file = tmp_path / "step-00000001" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CorruptCheckpointError):
        load_state(tmp_path / "step-00000001")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpointError):
        load_state(tmp_path / "step-00000001")
    file.unlink()
    with pytest.raises(CorruptCheckpointError):
        load_state(tmp_path / "step-00000001")


def test_a_checkpoint_that_does_not_fit_leaves_the_previous_one(tmp_path: Path, clip: Clip) -> None:
    save_checkpoint(tmp_path, clip, state(1), keep=1, job_id="job")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(DiskFullError):
            save_checkpoint(tmp_path, clip, state(2), keep=1, job_id="job")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    assert load_state(tmp_path / "step-00000001").step == 1


def test_every_random_generator_is_restored() -> None:
    device = torch.device("cpu")
    saved, tensors = random_state(device)
    saved = json.loads(json.dumps(saved))

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))]

    first = draw()
    assert draw() != first
    restore_random_state(device, saved, tensors)
    assert draw() == first


def test_a_schedule_warms_up_then_falls_to_the_end() -> None:
    shares = {
        shape: [
            Schedule(shape=shape, total_steps=100, warmup_fraction=0.1).share(step) for step in range(100)
        ]
        for shape in ("cosine", "linear", "constant")
    }
    for values in shares.values():
        assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares["cosine"][55] == pytest.approx(0.5)
    assert shares["linear"][55] == pytest.approx(0.5)
    assert shares["constant"][99] == 1.0
    assert 0.0 < shares["cosine"][99] < 0.01
    assert Schedule(shape="cosine", total_steps=4, warmup_fraction=0.0).share(0) == 1.0
    assert Schedule(shape="linear", total_steps=1, warmup_fraction=1.0).share(0) == 1.0


def test_changes_of_the_peak_hold_from_their_step_on_and_survive(tmp_path: Path) -> None:
    history = PeakHistory(tmp_path / "rates.json", 1e-3)
    history.change(10, 2e-3)
    history.change(20, 3e-3)
    again = PeakHistory(tmp_path / "rates.json", 1e-3)
    assert [again.at(step) for step in (0, 9, 10, 19, 20, 99)] == [1e-3, 1e-3, 2e-3, 2e-3, 3e-3, 3e-3]
    # Changed again after a resume from before step 20: what was to come there no longer holds.
    again.change(15, 5e-4)
    assert again.at(30) == 5e-4


def test_an_instruction_that_comes_twice_is_given_once_and_endings_are_known_before_they_are_taken() -> None:
    inbox = Inbox()
    pause = trainer_pb2.Instruction(command_id="a", command=job_pb2.JobCommand(pause=job_pb2.PauseCommand()))
    inbox.put(pause)
    inbox.put(pause)
    assert inbox.end_wanted
    assert inbox.next() == pause
    assert inbox.next() is None
    assert not inbox.end_wanted
    inbox.suspend()
    assert inbox.end_wanted
    assert inbox.wait().HasField("suspend")


def test_a_signal_reaches_a_trainer_that_waits_for_a_word() -> None:
    inbox = Inbox()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    inbox.suspend_on_signals()
    try:
        main = threading.main_thread().ident
        assert main is not None
        threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGTERM)).start()
        assert inbox.wait().HasField("suspend")
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
