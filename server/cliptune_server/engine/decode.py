"""From what a caller sent to what a tower takes, on threads.

Enters: `Picture`s and texts. Leaves: preprocessed image tensors and tokens, or the item's own error.
Called by `inference.py`. Images are decoded on a bounded pool; texts on one thread of their own, because
Hugging Face's tokenisers are not safe on several.

Shape suffixes: C channels, H height, W width, B texts, L tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from torch import Tensor

from cliptune.errors import CliptuneError, TextError
from cliptune_model.clip import Clip
from cliptune_model.image_reader import ImageReader
from cliptune_model.tokens import check_text
from cliptune_server.engine.backlog import Stage
from cliptune_server.engine.gpu_decode import GpuDecoding
from cliptune_server.engine.payload import Picture
from cliptune_server.engine.progress import Progress

# The largest image that is taken (100 megapixels) decodes in 3 s on one free core: fourfold beside a trainer,
# and five more on a machine that stutters.
_DECODE_LIMIT_S: Final = 17.0
_STALL_BASE_S: Final = 5.0
# Pixels only have to be resized: 4 s for the largest image, on a core that is not free.
_PIXELS_BYTE_S: Final = 4.0 / 300e6
# Texts in one turn of the text thread, so that a long request does not hold up a short one.
_TURN_TEXTS: Final = 64


class Decoder:
    """Threads that decode. `close` ends them."""

    def __init__(self, *, threads: int, progress: Progress) -> None:
        self._progress: Final = progress
        self.image_stage: Final = Stage(threads)
        self.text_stage: Final = Stage(1)
        self.seconds = 0.0
        """Of images, on all threads together, since the start."""
        self.items = 0
        # What is bulk never has more than the threads' own number in their queue, so that what is interactive
        # waits for one image each at most.
        self._bulk_turns: Final = asyncio.Semaphore(threads)
        self._images: Final = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._texts: Final = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        self._waiting = 0
        self._gpu: Final = GpuDecoding(progress=progress, on_batch=self._on_gpu)

    def close(self) -> None:
        """Does not wait for what runs: nobody waits for its result."""
        self._images.shutdown(wait=False, cancel_futures=True)
        self._texts.shutdown(wait=False, cancel_futures=True)
        self._gpu.close()

    async def image(self, reader: ImageReader, image: Picture, *, bulk: bool = False) -> Tensor:
        """One image → [3, H, W]; `bulk`: others go first. Raises what is wrong with it.

        On the CPU, or on the GPU where that decoded it.
        """
        gpu = reader.gpu if image.is_file else None
        if gpu is not None and self._gpu.is_sooner(self._threads_s(), bulk=bulk):
            image_CHW = await self._gpu.image(gpu, bytes(image.data), bulk=bulk)
            if image_CHW is not None:
                return image_CHW
        self._waiting += 1
        try:
            return await self._on_threads(reader, image, bulk=bulk)
        finally:
            self._waiting -= 1

    def _threads_s(self) -> float:
        """Until a thread has decoded an image that comes now."""
        return max(self.image_stage.alone_s, (self._waiting + 1) * self.image_stage.item_s)

    def _on_gpu(self, files: int, seconds: float) -> None:
        self.seconds += seconds
        self.items += files
        self.image_stage.record(files, seconds)

    async def _on_threads(self, reader: ImageReader, image: Picture, *, bulk: bool) -> Tensor:
        if bulk:
            async with self._bulk_turns:
                return await self._decoded(reader, image)
        return await self._decoded(reader, image)

    async def _decoded(self, reader: ImageReader, image: Picture) -> Tensor:
        seconds: list[float] = []
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._images, self._image, reader, image, seconds
            )
        finally:
            if seconds:
                self.seconds += sum(seconds)
                self.items += 1
                self.image_stage.record(1, sum(seconds))

    async def texts(
        self, clip: Clip, texts: Sequence[str], done: Callable[[], None] = lambda: None
    ) -> list[Tensor | CliptuneError]:
        """Texts → [L] each, cut as `Clip.trim` does, or the error of that text; `done` is called for each."""
        loop = asyncio.get_running_loop()
        decoded: list[Tensor | CliptuneError] = []
        for start in range(0, len(texts), _TURN_TEXTS):
            turn = texts[start : start + _TURN_TEXTS]
            seconds: list[float] = []
            decoded += await loop.run_in_executor(self._texts, self._tokenise, clip, turn, seconds)
            self.text_stage.record(len(turn), sum(seconds))
            for _ in turn:
                done()
        return decoded

    def _image(self, reader: ImageReader, image: Picture, seconds: list[float]) -> Tensor:
        limit_s = _DECODE_LIMIT_S if image.is_file else _STALL_BASE_S + _PIXELS_BYTE_S * len(image.data)
        with self._progress.working(limit_s), _timed(seconds):
            if image.is_file:
                return reader.encoded(bytes(image.data))
            return reader.pixels(image.array())

    def _tokenise(
        self, clip: Clip, texts: Sequence[str], seconds: list[float]
    ) -> list[Tensor | CliptuneError]:
        with self._progress.working(_DECODE_LIMIT_S), _timed(seconds):
            found: list[Tensor | CliptuneError] = []
            good: list[int] = []
            for place, text in enumerate(texts):
                try:
                    check_text(text)
                except TextError as error:
                    found.append(error)
                else:
                    good.append(place)
                    found.append(TextError("not tokenised"))
            if good:
                tokens_BL = clip.tokenize([texts[place] for place in good])
                for place, tokens_L in zip(good, tokens_BL, strict=True):
                    found[place] = clip.trim(tokens_L[None])[0]
            return found


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    began_s = time.perf_counter()
    try:
        yield
    finally:
        seconds.append(time.perf_counter() - began_s)
