"""How the threads of trainers and engines wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliptune.errors import InvalidInputError
from cliptune_server.compute_environment import SPIN_COUNT, compute_environment
from cliptune_server.config import ServerConfig


def test_threads_spin_shortly_so_that_processes_share_the_cores() -> None:
    assert compute_environment({"HOME": "/h"}) == {"HOME": "/h", "GOMP_SPINCOUNT": SPIN_COUNT}


def test_what_the_user_chose_stays() -> None:
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        assert compute_environment(chosen) == chosen


def test_only_the_owners_folders_may_bring_code_whatever_was_inherited() -> None:
    inherited = {"CLIPTUNE_ALLOW_CODE": "/anybody", "OMP_WAIT_POLICY": "ACTIVE"}
    assert compute_environment(inherited) == {"OMP_WAIT_POLICY": "ACTIVE"}
    allowed = compute_environment(inherited, [Path("/srv/a"), Path("/srv/b")])
    assert allowed["CLIPTUNE_ALLOW_CODE"] == "/srv/a:/srv/b"


def test_a_code_folder_is_taken_where_its_links_lead_and_must_exist(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "code")
    config = ServerConfig(home=tmp_path, code_folders=(tmp_path / "link",))
    assert config.code_folders == (tmp_path / "code",)
    with pytest.raises(InvalidInputError, match=r"the code folder .*missing is not a folder"):
        ServerConfig(home=tmp_path, code_folders=(tmp_path / "missing",))
