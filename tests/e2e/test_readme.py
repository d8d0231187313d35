"""The README says only what runs: its blocks are executed as they stand, against a real daemon."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cliptune
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import write_csv

README = Path(__file__).resolve().parents[2] / "README.md"
CLIPTUNE = Path(sys.executable).parent / "cliptune"
ADDRESS = "127.0.0.1:8000"
PAIRS = [("red", "circle"), ("blue", "square")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README presumes: `captions.csv` with its images, and two images to ask about."""
    folder = tmp_path_factory.mktemp("readme")
    rows = []
    for number in range(40):
        colour, shape = PAIRS[number % 2]
        path = folder / f"{number}.png"
        path.write_bytes(images.png(colour, shape, seed=number))
        row = {"image": path.name, "caption": images.caption(colour, shape), "label": f"{colour} {shape}"}
        rows.append(row)
    write_csv(folder / "captions.csv", rows)
    for colour, shape in PAIRS:
        (folder / f"{colour}.png").write_bytes(images.png(colour, shape, seed=99))
    (folder / "spec.toml").write_text(blocks("toml")[0], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[RunningDaemon]:
    with running_daemon(folder / "home", data_roots=[folder], threads=2) as daemon:
        yield daemon


def run(command: list[str], folder: Path, daemon: RunningDaemon) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "CLIPTUNE_HOME": str(daemon.home)},
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}\n{daemon.log_tail()}"
    return done.stdout


def test_the_python_example_is_about_twenty_lines_and_runs(folder: Path, daemon: RunningDaemon) -> None:
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 22
    printed = run([sys.executable, "-c", example], folder, daemon)
    assert "step 1: loss" in printed
    assert "before" in printed
    assert "after" in printed
    assert printed.splitlines()[-1].startswith("shapes:1 (2, ")


def test_the_spec_example_is_a_whole_spec(folder: Path) -> None:
    spec = cliptune.load_spec(folder / "spec.toml")
    assert spec.publish.aliases == ["prod"]
    assert [entry.label for entry in spec.evaluation.classes] == ["red circle", "blue square"]


def test_the_command_lines_run_in_their_order(folder: Path, daemon: RunningDaemon) -> None:
    lines = [line.partition("#")[0].strip() for line in blocks("sh")[1].splitlines()]
    assert len(lines) >= 7
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "cliptune"
        run([str(CLIPTUNE), *arguments], folder, daemon)
    assert (folder / "vectors.npy").stat().st_size > 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_requests_from_any_language_are_answered(folder: Path, daemon: RunningDaemon) -> None:
    models, classified, embedded = (
        json.loads(run(shlex.split(line.replace(ADDRESS, daemon.url)), folder, daemon))
        for line in blocks("sh")[2].splitlines()
    )
    assert "shapes" in {model["name"] for model in models["data"]}
    assert classified["predictions"][0]["label"] in classified["labels"]
    assert len(embedded["data"][0]["embedding"]) > 0


def test_the_commands_that_open_it_are_targets_of_the_makefile() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    first = [line.partition("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert first == ["make demo", "make test"]
    for command in first:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
