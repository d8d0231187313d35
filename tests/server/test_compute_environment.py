"""How the threads of trainers and engines wait."""

from __future__ import annotations

from cliptune_server.compute_environment import SPIN_COUNT, compute_environment


def test_threads_spin_shortly_so_that_processes_share_the_cores() -> None:
    assert compute_environment({"HOME": "/h"}) == {"HOME": "/h", "GOMP_SPINCOUNT": SPIN_COUNT}


def test_what_the_user_chose_stays() -> None:
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        assert compute_environment(chosen) == chosen
