"""The command line as a user runs it: processes, a real terminal, real signals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cliptune import JobState, StateChange
from cliptune.cli import main as cli
from cliptune.cli.verb import Verb
from tests.sdk.conftest import House
from tests.support import images

LIMIT_S = 90


def cliptune(house: House | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CLIPTUNE_ADDRESS": house.daemon.grpc if house else "127.0.0.1:1"}
    return subprocess.run(
        [sys.executable, "-m", "cliptune.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.png").write_bytes(images.png(seed=1))
    (folder / "b.jpg").write_bytes(images.jpeg("blue", "square"))
    (folder / "broken.jpg").write_bytes(images.truncated_jpeg())
    return [str(folder / name) for name in ("a.png", "b.jpg", "broken.jpg")]


def test_help_of_every_verb_has_examples_and_needs_nothing_heavy() -> None:
    code = """
import contextlib, io, sys
from cliptune.cli.main import main
VERBS = ("train", "tune", "jobs", "models", "data", "domains", "embed", "match", "classify")
for verb in ("", *VERBS, "serve", "doctor", "demo"):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([verb, "--help"] if verb else ["--help"])
    assert not verb or "examples:" in shown.getvalue(), verb
assert not {"torch", "PIL", "rich", "fastapi", "sqlalchemy", "uvicorn"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=LIMIT_S)


def test_a_missing_extra_is_answered_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    def run(options: object) -> int:
        raise ImportError("No module named 'torch'", name="torch")

    verb = Verb(
        name="v", summary="s", examples=(), add_arguments=lambda parser: None, run=run, extra="server"
    )
    point = SimpleNamespace(name="v", load=lambda: verb)
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [point])
    assert cli.main(["v"]) == 1
    assert "torch is not installed: pip install 'cliptune[server]'" in capsys.readouterr().err


def test_an_error_is_one_line_with_its_class_and_a_status() -> None:
    away = cliptune(None, "jobs", "list")
    assert away.returncode == 1
    assert re.fullmatch(r"error: UnavailableError: .*cliptune serve.*\n", away.stderr)
    wrong = cliptune(None, "train", "nowhere.toml")
    assert wrong.returncode == 2
    assert re.fullmatch(r"error: InvalidInputError: .*\n", wrong.stderr)
    assert cliptune(None, "dance").returncode == 2
    assert re.match(r"cliptune \d+\.\d+", cliptune(None, "--version").stdout)


def test_embed_prints_rows_json_or_writes_an_array(house: House, pictures: list[str], tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    written = cliptune(house, "embed", *pictures, "--model", "shapes", "--output", str(out), "--progress")
    assert written.returncode == 1  # one of them is broken
    assert "broken.jpg: ImageDecodeError" in written.stderr
    vectors = np.load(out)
    assert np.isnan(vectors).any(axis=1).tolist() == [False, False, True]
    lines = cliptune(house, "embed", *pictures, "--model", "shapes", "--json").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    np.testing.assert_allclose(answers[0]["embedding"], vectors[0], atol=1e-5)
    assert answers[2]["error"]["reason"] == "ImageDecodeError"
    table = cliptune(house, "embed", "--text", "a red circle", "--model", "shapes")
    assert table.returncode == 0
    assert "a red circle" in table.stdout


def test_match_and_classify_print_a_table_or_json_lines(house: House, pictures: list[str]) -> None:
    common = ["--model", "shapes@prod"]
    matched = cliptune(house, "match", *pictures[:2], "--text", "a circle", "--text", "a square", *common)
    assert matched.returncode == 0, matched.stderr
    assert re.search(r"a\.png +-?\d\.\d{4} +-?\d\.\d{4}", matched.stdout)
    classes = ["--class", "circle", "--class", "square=a square", "--class", "square=a box"]
    classified = cliptune(house, "classify", *pictures, *classes, *common, "--json")
    answers = [json.loads(line) for line in classified.stdout.splitlines()]
    assert set(answers[0]["probabilities"]) == {"circle", "square"}
    assert answers[2]["error"]["reason"] == "ImageDecodeError"
    assert classified.returncode == 1
    assert "CLASS" in cliptune(house, "classify", pictures[0], *classes, *common).stdout


def test_models_are_listed_and_aliased(house: House) -> None:
    assert "shapes:1" in cliptune(house, "models", "list").stdout
    assert (
        json.loads(cliptune(house, "models", "alias", "shapes:1", "next", "--json").stdout)[0]["version"] == 1
    )
    assert cliptune(house, "models", "unalias", "shapes", "next").returncode == 0
    shown = cliptune(house, "models", "show", "shapes@prod").stdout
    assert "loaded on cpu" in shown
    assert "served in fp32; towers " in shown
    listed = cliptune(house, "models", "list").stdout
    assert "SERVED IN" in listed
    assert "fp32" in listed
    assert "ModelNotFoundError" in cliptune(house, "models", "load", "nobody").stderr


def test_train_follows_in_plain_lines_and_ends_as_the_job_does(house: House, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(house.spec("plain")))
    wrong = cliptune(house, "train", str(spec), "--set", "train.epoch=1")
    assert wrong.returncode == 2
    assert "train.epochs" in wrong.stderr
    done = cliptune(house, "train", str(spec), "--set", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("step 2/2 ") for line in lines)
    assert any(line.startswith("evaluation (after)") for line in lines)
    assert lines[-1] == "succeeded"
    job_id = done.stderr.split()[1]
    events = [
        json.loads(line) for line in cliptune(house, "jobs", "watch", job_id, "--json").stdout.splitlines()
    ]
    assert [int(event["number"]) for event in events] == list(range(1, len(events) + 1))
    assert "SUCCEEDED" in cliptune(house, "jobs", "list", "--state", "succeeded").stdout
    assert "METRIC" in cliptune(house, "jobs", "show", job_id).stdout
    refused = cliptune(house, "jobs", "pause", job_id)
    assert refused.returncode == 1
    assert "JobStateError" in refused.stderr
    assert cliptune(house, "jobs", "delete", job_id).returncode == 0


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, house: House, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["CLIPTUNE_ADDRESS"] = house.daemon.grpc
            os.execv(sys.executable, [sys.executable, "-m", "cliptune.cli.main", *arguments])
        self.seen = ""

    def until(self, text: str) -> None:
        """Reads until `text` has come."""
        deadline_s = time.monotonic() + LIMIT_S
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"{text!r} did not come:\n{self.seen}"
            self.seen += os.read(self.fd, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        """Presses keys; \\x03 is Ctrl-C."""
        self.seen = ""
        os.write(self.fd, text.encode())

    def status(self) -> int:
        """Exit status at its end."""
        try:
            while chunk := os.read(self.fd, 65536):
                self.seen += chunk.decode(errors="replace")
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_detaches_or_cancels_as_the_user_says(house: House, tmp_path: Path) -> None:
    spec = tmp_path / "long.json"
    spec.write_text(json.dumps(house.spec("long", epochs=100_000)))
    terminal = Terminal(house, "train", str(spec))
    terminal.until("running")
    terminal.type("\x03")
    terminal.until("[d]etach, [c]ancel, or Enter to go on?")
    terminal.type("\n")  # go on
    terminal.until("training")
    terminal.type("\x03")
    terminal.until("[d]etach")
    terminal.type("d\n")
    assert terminal.status() == 130
    job = next(job for job in house.client.list_jobs() if job.name == "long")
    assert f"cliptune jobs watch {job.id}" in terminal.seen
    assert job.state is JobState.RUNNING

    # Without a terminal a SIGINT detaches at once.
    watcher = subprocess.Popen(
        [sys.executable, "-m", "cliptune.cli.main", "jobs", "watch", job.id, "--address", house.daemon.grpc],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None
    for line in watcher.stdout:
        if line.startswith("step "):
            watcher.send_signal(signal.SIGINT)
            break
    _, said = watcher.communicate(timeout=LIMIT_S)
    assert watcher.returncode == 130
    assert "the job goes on" in said
    assert house.client.get_job(job.id).state is JobState.RUNNING

    # Commands of the command line reach the running job.
    assert cliptune(house, "jobs", "set-lr", job.id, "1e-4").returncode == 0
    assert "RUNNING" in cliptune(house, "jobs", "yield", job.id, "0").stdout
    cancelled = cliptune(house, "jobs", "cancel", job.id)
    assert cancelled.returncode == 0, cancelled.stderr
    states = [
        event.body.state for event in house.client.watch_job(job.id) if isinstance(event.body, StateChange)
    ]
    assert states[-1] is JobState.CANCELLED
    assert cliptune(house, "jobs", "watch", job.id).returncode == 3


def test_ctrl_c_then_c_cancels_the_job_that_is_followed(house: House, tmp_path: Path) -> None:
    spec = tmp_path / "long.json"
    spec.write_text(json.dumps(house.spec("cancel-me", epochs=100_000)))
    terminal = Terminal(house, "train", str(spec))
    terminal.until("preparing")
    terminal.type("\x03")
    terminal.until("[c]ancel")
    terminal.type("c\n")
    assert terminal.status() == 3
    job = next(job for job in house.client.list_jobs() if job.name == "cancel-me")
    assert job.state is JobState.CANCELLED
