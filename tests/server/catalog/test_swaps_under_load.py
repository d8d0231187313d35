"""A new version takes over under load: no request fails, each is answered by the version that it says.

`python -m bench.endurance --swaps 100` makes more of them, and holds the engine's memory to 1 %.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.daemon import running_daemon
from tests.support.memory import resident_bytes
from tests.support.models import publish_test_model
from tests.support.swapping import Swapping, growth

SWAPS = 10
WARM_UP = 4
# The first swaps of a process still touch new memory; a model left behind each time would be 6 MB a swap.
GROWTH = 0.04


def test_no_request_fails_and_no_memory_is_kept_while_versions_take_turns(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = publish_test_model(home, "shapes", seed=1, aliases=["prod"], serve=True)
    second = publish_test_model(home, "shapes", seed=2)
    with running_daemon(home) as daemon:
        keys = tuple(f"shapes:{model.version}" for model in (first, second))
        swapping = Swapping(daemon.grpc, "shapes@prod", (keys[0], keys[1]))
        samples: list[dict[int, int]] = []

        async def sample(number: int) -> None:
            if number in (WARM_UP - 1, SWAPS - 1):
                samples.append(await asyncio.to_thread(resident_bytes, daemon.pid))

        asyncio.run(swapping.run(SWAPS, sample))
        assert set(swapping.answered) == set(keys)
        assert min(swapping.answered.values()) >= SWAPS
        assert growth(samples) < GROWTH
