"""Aliases that move again and again between two versions while requests come over every kind of call.

Enters: a daemon that serves two versions of a model by an alias. Leaves: how many requests were answered, by
version; AssertionError at one that failed, or that was answered with another version's vector than it says.
`test_swaps_under_load.py` makes some swaps, `python -m bench.endurance` as many as one likes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from cliptune import AsyncClient
from cliptune.results import Embeddings
from tests.support import images

Vector = npt.NDArray[np.float32]
_IMAGES: Final = [images.png("red"), images.jpeg("blue", "square"), images.jpeg("green", size=200)]
_TEXTS: Final = ["a red circle", "a blue square", "ein grünes Dreieck"]
# A swap waits for so many answers of each caller, so that all of them go through both versions.
_ANSWERS_BETWEEN: Final = 2


class Swapping:
    """Moves `NAME@ALIAS` between `keys` under load."""

    def __init__(self, address: str, reference: str, keys: tuple[str, str]) -> None:
        self._address: Final = address
        self._reference: Final = reference
        self._keys: Final = keys
        self.answered: Final[Counter[str]] = Counter()
        """Requests by the version that answered."""
        self._turns: Final[Counter[int]] = Counter()
        self._progress: Final = asyncio.Condition()
        self._wanted: dict[tuple[str, str], Vector] = {}

    async def run(self, swaps: int, after_each: Callable[[int], Awaitable[None]]) -> None:
        """So many swaps; `after_each` is told the number of each."""
        name, _, alias = self._reference.partition("@")
        assert all(key.startswith(f"{name}:") for key in self._keys)
        async with AsyncClient(self._address) as control:
            for key in reversed(self._keys):
                await control.set_alias(key, alias, timeout_s=120)
                pictures = await control.embed_images(_IMAGES, model=self._reference)
                texts = await control.embed_texts(_TEXTS, model=self._reference)
                assert (pictures.model, texts.model) == (key, key)
                self._wanted[key, "images"] = np.asarray(pictures)
                self._wanted[key, "texts"] = np.asarray(texts)
            callers = (self._images, self._texts, self._texts, self._stream)
            tasks = [asyncio.create_task(self._call(number, one)) for number, one in enumerate(callers)]
            try:
                for number in range(swaps):
                    await control.set_alias(self._keys[(number + 1) % 2], alias, timeout_s=120)
                    await self._until_all_were_answered(tasks)
                    await after_each(number)
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            for outcome in ended:
                if not isinstance(outcome, asyncio.CancelledError):
                    raise AssertionError("a caller ended") from outcome

    async def _until_all_were_answered(self, tasks: list[asyncio.Task[None]]) -> None:
        async with self._progress:
            least = {number: self._turns[number] + _ANSWERS_BETWEEN for number in range(len(tasks))}
            async with asyncio.timeout(120):
                await self._progress.wait_for(
                    lambda: (
                        any(task.done() for task in tasks)
                        or all(self._turns[number] >= turns for number, turns in least.items())
                    )
                )
        for task in tasks:
            if task.done():
                await task  # its error

    async def _call(self, number: int, ask: Callable[[AsyncClient], Awaitable[None]]) -> None:
        # One attempt: what fails is not hidden by being asked again.
        async with AsyncClient(self._address, attempts=1) as client:
            while True:
                await ask(client)
                async with self._progress:
                    self._turns[number] += 1
                    self._progress.notify_all()

    async def _images(self, client: AsyncClient) -> None:
        self._check("images", await client.embed_images(_IMAGES, model=self._reference))

    async def _texts(self, client: AsyncClient) -> None:
        self._check("texts", await client.embed_texts(_TEXTS, model=self._reference))

    async def _stream(self, client: AsyncClient) -> None:
        self._check("images", await client.embed_many(_IMAGES * 4, "images", model=self._reference), 4)

    def _check(self, kind: str, answer: Embeddings, times: int = 1) -> None:
        assert answer.model in self._keys, answer.model
        wanted_ND = np.tile(self._wanted[answer.model, kind], (times, 1))
        np.testing.assert_allclose(np.asarray(answer), wanted_ND, atol=2e-5)
        self.answered[answer.model] += 1


def growth(samples: list[Mapping[int, int]]) -> float:
    """By how much of the first the last of `samples` (process → bytes) is larger, at the worst process."""
    first, last = samples[0], samples[-1]
    assert set(first) == set(last), "a process was replaced"
    return max((last[pid] - first[pid]) / first[pid] for pid in first)
