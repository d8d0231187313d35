"""One daemon a home: the lock, the owner's name, the paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cliptune.errors import HomeLockedError, InvalidInputError
from cliptune_server.database import Database, JobRow
from cliptune_server.home import Home

HOLD = """
import sys
from cliptune_server.home import Home
home = Home.open(sys.argv[1])
home.announce(grpc="127.0.0.1:1234", http="127.0.0.1:5678")
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_opener_is_refused_by_the_name_of_the_first_and_a_kill_frees_the_home(
    tmp_path: Path,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "home")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(HomeLockedError) as refused:
            Home.open(tmp_path / "home")
        for part in (f"pid {process.pid}", "127.0.0.1:1234", "127.0.0.1:5678", str(tmp_path)):
            assert part in refused.value.message
        process.kill()
    with Home.open(tmp_path / "home") as home:
        assert home.owner.pid == os.getpid()


def test_the_addresses_are_written_while_the_daemon_lives(tmp_path: Path) -> None:
    with Home.open(tmp_path) as home:
        home.announce(grpc="127.0.0.1:1", http="127.0.0.1:2")
        written = json.loads(home.address_path.read_text())
        assert written == {"pid": os.getpid(), "grpc": "127.0.0.1:1", "http": "127.0.0.1:2"}
    assert not home.address_path.exists()


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(InvalidInputError, match="not a folder"):
        Home.open(tmp_path / "home")


def test_a_home_with_a_long_path_has_a_short_socket_that_is_the_same_every_time(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    with Home.open(deep) as home:
        first = home.link_path()
        assert len(os.fsencode(first)) <= 90
    with Home.open(deep) as home:
        assert home.link_path() == first
    assert first.parent.stat().st_mode & 0o077 == 0
    first.parent.rmdir()


def test_a_damaged_index_starts_empty_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cliptune.db"
    database = Database.open(path)
    assert database.fresh
    database.run_now(
        lambda session: session.add(JobRow(id="a", name="a", state=1, created_ns=1, message=b""))
    )
    database.close()
    again = Database.open(path)
    assert not again.fresh
    assert again.run_now(lambda session: session.get(JobRow, "a")) is not None
    again.close()
    path.write_bytes(b"this is no database" * 1000)
    rebuilt = Database.open(path)
    assert rebuilt.fresh
    assert rebuilt.run_now(lambda session: session.get(JobRow, "a")) is None
    rebuilt.close()
