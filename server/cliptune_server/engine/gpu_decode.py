"""JPEG files that the GPU decodes, beside the threads that decode: both share the load.

Enters: files, with what reads them on the GPU. Leaves: preprocessed images on the device, or nothing: then
the threads are to read the file. Used by `decode.py`, on the event loop; one thread talks to the decoder.

Work-conserving, as the batcher is: an idle decoder takes what is there, a busy one leaves with whatever has
come meanwhile. A file goes where it is decoded sooner, by what both were measured to take. A batch that fails
goes to the threads, where the file that is at fault gets its error; a decoder that fails again and again is
not asked any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

from torch import Tensor

from cliptune_model.gpu_jpeg import GpuJpeg
from cliptune_server.engine.progress import Progress

_log = logging.getLogger(__name__)

_BATCH_FILES: Final = 64
_LIMIT_S: Final = 60.0
# Batches in a row that may fail: hostile files fail some, a decoder that does not work fails them all.
_FAILURES: Final = 16
# Each batch counts this much less than the one after it.
_MEMORY: Final = 0.8


@dataclass(eq=False, kw_only=True, slots=True)
class _Waiting:
    reader: GpuJpeg
    file: bytes
    image: asyncio.Future[Tensor | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class GpuDecoding:
    """`image` decodes one file. `on_batch` is told of each batch: files, seconds."""

    def __init__(self, *, progress: Progress, on_batch: Callable[[int, float], None]) -> None:
        self._progress: Final = progress
        self._on_batch: Final = on_batch
        self._thread: Final = ThreadPoolExecutor(1, thread_name_prefix="gpu-decode")
        self._queues: Final[tuple[deque[_Waiting], deque[_Waiting]]] = (deque(), deque())
        """Interactive, then bulk."""
        self._running = 0
        self._serving: asyncio.Task[None] | None = None
        self._seconds = 0.0
        self._files = 0.0
        self._failures = 0
        self.files = 0
        """Decoded so far."""

    def close(self) -> None:
        """What waits is left to the threads."""
        for queue in self._queues:
            for waiting in queue:
                _settle(waiting, None)
            queue.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def file_s(self) -> float:
        """Seconds of a file, in batches as they come; 0 before the first."""
        return self._seconds / self._files if self._files else 0.0

    def is_sooner(self, threads_s: float, *, bulk: bool = False) -> bool:
        """Whether a file that comes now is decoded here before it would be after `threads_s` by a thread."""
        if self._failures >= _FAILURES:
            return False
        before = self._running + sum(map(len, self._queues[: 1 + bulk]))
        return (before + 1) * self.file_s <= threads_s

    async def image(self, reader: GpuJpeg, file: bytes, *, bulk: bool = False) -> Tensor | None:
        """[3, H, W] on the device; `bulk`: others go first. None: the threads are to read it."""
        waiting = _Waiting(reader=reader, file=file)
        self._queues[bulk].append(waiting)
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve(), name="gpu-decode")
        try:
            return await waiting.image
        finally:
            waiting.image.cancel()  # a caller that has gone: nobody waits for it

    async def _serve(self) -> None:
        try:
            while batch := self._take():
                await self._decode(batch)
        finally:
            self._serving = None

    def _take(self) -> list[_Waiting]:
        """Files of one reader: they have one size afterwards."""
        taken: list[_Waiting] = []
        for queue in self._queues:
            left: list[_Waiting] = []
            while queue and len(taken) < _BATCH_FILES:
                waiting = queue.popleft()
                if waiting.image.done():
                    continue
                (taken if not taken or waiting.reader is taken[0].reader else left).append(waiting)
            queue.extendleft(reversed(left))
        return taken

    async def _decode(self, batch: list[_Waiting]) -> None:
        self._running = len(batch)
        try:
            loop = asyncio.get_running_loop()
            images, seconds = await loop.run_in_executor(self._thread, self._read, batch)
        except Exception as error:  # one file of them, or the decoder: the threads find out which
            self._failures += 1
            _log.info("%d files go to the threads: the GPU's decoder failed: %s", len(batch), error)
            if self._failures == _FAILURES:
                _log.warning("the GPU's decoder failed %d times in a row and is not asked again", _FAILURES)
            for waiting in batch:
                _settle(waiting, None)
            return
        finally:
            self._running = 0
        taken = [(waiting, image) for waiting, image in zip(batch, images, strict=True) if image is not None]
        for waiting, image_CHW in zip(batch, images, strict=True):
            _settle(waiting, image_CHW)
        if taken:
            self._failures = 0
            self.files += len(taken)
            self._seconds = _MEMORY * self._seconds + seconds
            self._files = _MEMORY * self._files + len(taken)
            self._on_batch(len(taken), seconds)

    def _read(self, batch: list[_Waiting]) -> tuple[list[Tensor | None], float]:
        """None for a file that the GPU does not take."""
        reader = batch[0].reader
        with self._progress.working(_LIMIT_S):
            began_s = perf_counter()
            places = [place for place, waiting in enumerate(batch) if reader.takes(waiting.file)]
            found: list[Tensor | None] = [None] * len(batch)
            if places:
                for place, image_CHW in zip(
                    places, reader.read([batch[place].file for place in places]), strict=True
                ):
                    found[place] = image_CHW
            return found, perf_counter() - began_s


def _settle(waiting: _Waiting, image_CHW: Tensor | None) -> None:
    if not waiting.image.done():
        waiting.image.set_result(image_CHW)
