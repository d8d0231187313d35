"""A catalog in memory, and helpers of the tests that run a supervisor."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cliptune.errors import ModelNotFoundError
from cliptune_server.inference.engine_process import EngineConfig
from cliptune_server.inference.engines import EngineState, EngineSupervisor


class MemoryCatalog:
    """References → keys, changed by the test."""

    def __init__(self, **keys: str) -> None:
        self.keys = keys
        self.held: Counter[str] = Counter()
        self.shadows: dict[str, str] = {}

    async def resolve(self, reference: str) -> str:
        key = self.keys.get(reference)
        if key is None:
            raise ModelNotFoundError(f"no model {reference!r}", model=reference)
        return key

    async def changed(self) -> None:
        await asyncio.Event().wait()  # nothing is ever being loaded

    def shadow(self, reference: str) -> str | None:
        return self.shadows.get(reference)

    def hold(self, key: str) -> None:
        self.held[key] += 1

    def release(self, key: str) -> None:
        self.held[key] -= 1


class Told:
    """What `on_change` said; `until` waits for it."""

    def __init__(self) -> None:
        self.states: list[EngineState] = []
        self._changed = asyncio.Event()

    def __call__(self, state: EngineState) -> None:
        self.states.append(state)
        self._changed.set()

    async def until(self, wanted: Callable[[EngineState], bool], timeout_s: float = 60) -> EngineState:
        """The first state since the last call that is as wanted."""
        async with asyncio.timeout(timeout_s):
            while True:
                while self.states:
                    state = self.states.pop(0)
                    if wanted(state):
                        return state
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def supervising(config: EngineConfig) -> AsyncIterator[tuple[EngineSupervisor, Told]]:
    told = Told()
    engines = EngineSupervisor(config, on_change=told)
    await engines.start()
    try:
        yield engines, told
    finally:
        await engines.stop(20)
