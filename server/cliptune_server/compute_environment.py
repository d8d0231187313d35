"""The environment of the processes that compute: trainers and engines.

Called by the launcher and by the engine's supervisor, before the child has loaded a thread pool.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

# libgomp's idle threads spin by default, about 5 ms, before they sleep. Where a trainer and an engine share
# the cores, the spinning of the one takes the other's: with a busy neighbour, two-thread training of a small
# ViT was nearly twice as fast with short spinning, and no slower on free cores.
SPIN_COUNT: Final = "3000"


# Where those processes look for the folders whose Python files they may run (`cliptune_model.own_code`).
ALLOW_CODE: Final = "CLIPTUNE_ALLOW_CODE"


def compute_environment(inherited: Mapping[str, str], code_folders: Sequence[Path] = ()) -> dict[str, str]:
    """`inherited`, with short spinning unless the user chose how OpenMP's threads wait.

    `code_folders` alone say whose code may be run: what was inherited does not.
    """
    environment = {name: value for name, value in inherited.items() if name != ALLOW_CODE}
    if code_folders:
        environment[ALLOW_CODE] = os.pathsep.join(map(str, code_folders))
    if not inherited.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
    return environment
