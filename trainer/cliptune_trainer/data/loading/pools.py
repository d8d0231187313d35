"""Who decodes: threads of the trainer, or processes that write pixels into memory shared with it.

Enters: requests, a chunk of them at a time. Leaves: their pixels, and why some cannot be read. Called by the
loader's assembly. Between the processes only names travel, no pixels.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from cliptune_trainer.data.loading.decode import Bytes4, Decoder, decode_rows, thread_pool
from cliptune_trainer.data.loading.shared import SharedBytes, shared_bytes
from cliptune_trainer.data.processes import spawned
from cliptune_trainer.data.source import Request

# A chunk is one message: so large that messages cost nothing, so small that all workers share a batch.
_CHUNK_ROWS: Final = 32
_CHUNK_BYTES: Final = 4 << 20
# Decoded pixels that wait to be used.
_MAX_WAITING_BYTES: Final = 512 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Requests under way. `reasons` are `decode_rows`'s; `pixels_NHW3` is whole once they are there."""

    requests: Sequence[Request]
    decoder: Decoder
    reasons: Future[list[str]]
    pixels_NHW3: Bytes4
    slot: int = -1


class Pool(Protocol):
    """Decodes chunks, `capacity` of them at once and no more."""

    rows: int
    capacity: int

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that were started so far; none: threads decode."""
        ...

    def submit(self, requests: Sequence[Request], decoder: Decoder) -> Chunk:
        """Begins to decode at most `rows` requests; `decoder` makes no larger images than the pool's own."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Its pixels were used, and it was finished or cancelled."""
        ...

    def close(self) -> None:
        """Ends what is under way. Chunks must be let go first."""
        ...


class Threads:
    """Threads of this process."""

    def __init__(self, *, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._threads = thread_pool()
        self.process_ids: list[int] = []

    def submit(self, requests: Sequence[Request], decoder: Decoder) -> Chunk:
        """See `Pool`."""
        pixels = np.empty((len(requests), *decoder.shape), np.uint8)
        reasons = self._threads.submit(decode_rows, decoder, requests, pixels)
        return Chunk(requests, decoder, reasons, pixels)

    def release(self, chunk: Chunk) -> None:
        """See `Pool`."""

    def close(self) -> None:
        """See `Pool`."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class Processes:
    """Spawned processes and the ring of slots that they write into. A dead one breaks the pool: its chunks
    raise `BrokenProcessPool`.

    Raises:
        OSError: no shared memory can be had.
    """

    def __init__(self, decoder: Decoder, workers: int, *, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        slot_bytes = rows * int(np.prod(decoder.shape))
        self._memory = shared_bytes(capacity * slot_bytes)
        self._slots_SK = np.frombuffer(self._memory.buffer, np.uint8).reshape(capacity, slot_bytes)
        self._free = deque(range(capacity))
        self._executor = spawned(workers, _start_worker, self._memory, slot_bytes)

    def submit(self, requests: Sequence[Request], decoder: Decoder) -> Chunk:
        """See `Pool`. Raises `BrokenProcessPool`."""
        reasons = self._executor.submit(_work, self._free[0], requests, decoder)
        slot = self._free.popleft()
        return Chunk(
            requests, decoder, reasons, _pixels_in(self._slots_SK[slot], len(requests), decoder), slot
        )

    def release(self, chunk: Chunk) -> None:
        """See `Pool`."""
        self._free.append(chunk.slot)

    def close(self) -> None:
        """See `Pool`."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        del self._slots_SK
        with contextlib.suppress(BufferError):  # a chunk is still looked at: the memory goes with it
            self._memory.close()

    @property
    def process_ids(self) -> list[int]:
        """See `Pool`."""
        return list(self._executor._processes or ())


def open_pool(decoder: Decoder, *, workers: int, batch_size: int) -> Pool:
    """Processes, or threads where `workers` is 0, with chunks and look-ahead for batches of `batch_size`.

    `decoder`: the one that makes the largest images.

    Two batches are decoded ahead where `_MAX_WAITING_BYTES` holds them.

    Raises:
        OSError: no shared memory can be had.
    """
    hands = workers or min(os.cpu_count() or 1, 8)
    image_bytes = int(np.prod(decoder.shape))
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // image_bytes, batch_size // (2 * hands)))
    wanted = -(-2 * batch_size // rows)
    capacity = max(2 * hands, min(wanted, _MAX_WAITING_BYTES // (rows * image_bytes)))
    if workers:
        return Processes(decoder, workers, rows=rows, capacity=capacity)
    return Threads(rows=rows, capacity=capacity)


def _pixels_in(slot_K: np.ndarray[tuple[int], np.dtype[np.uint8]], rows: int, decoder: Decoder) -> Bytes4:
    """The beginning of a slot, as images of the decoder's size."""
    shape = (rows, *decoder.shape)
    return slot_K[: int(np.prod(shape))].reshape(shape)


# -- in a decoding process


class _Worker:
    """What a decoding process holds."""

    def __init__(self, memory: SharedBytes, slot_bytes: int) -> None:
        self._memory = memory
        self._slots_SK = np.frombuffer(memory.buffer, np.uint8).reshape(-1, slot_bytes)

    def decode(self, slot: int, requests: Sequence[Request], decoder: Decoder) -> list[str]:
        return decode_rows(decoder, requests, _pixels_in(self._slots_SK[slot], len(requests), decoder))

    def end(self) -> None:
        del self._slots_SK
        self._memory.close()


_worker: _Worker | None = None


def _start_worker(memory: SharedBytes, slot_bytes: int) -> None:
    global _worker
    _worker = _Worker(memory, slot_bytes)
    atexit.register(_worker.end)


def _work(slot: int, requests: Sequence[Request], decoder: Decoder) -> list[str]:
    if _worker is None:
        raise RuntimeError("not a decoding process")
    return _worker.decode(slot, requests, decoder)
