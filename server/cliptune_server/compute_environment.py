"""The environment of the processes that compute: trainers and engines.

Called by the launcher and by the engine's supervisor, before the child has loaded a thread pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# libgomp's idle threads spin by default, about 5 ms, before they sleep. Where a trainer and an engine share
# the cores, the spinning of the one takes the other's: with a busy neighbour, two-thread training of a small
# ViT was nearly twice as fast with short spinning, and no slower on free cores.
SPIN_COUNT: Final = "3000"


def compute_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited`, with short spinning unless the user chose how OpenMP's threads wait."""
    chosen = "GOMP_SPINCOUNT" in inherited or "OMP_WAIT_POLICY" in inherited
    return dict(inherited) if chosen else {**inherited, "GOMP_SPINCOUNT": SPIN_COUNT}
