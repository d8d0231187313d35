"""Batches of image-caption pairs, decoded ahead of the step that needs them.

Enters: pairs and a decoder. Leaves: `Batch`es, one for each step. Called by the loop. Which rows a step sees
and how they are augmented is a pure function of (seed, step), so a loader is restored by telling it the step
to begin with.

B: pairs in a batch, L: context length, H, W: image height and width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from cliptune.errors import CliptuneError, DataError
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.decode import Decoder, Pixels, process_pool, thread_pool, work
from cliptune_trainer.data.table import Pair

# Batches under way at once: one being stepped on, this many being decoded.
_AHEAD: Final = 2
# Rows tried in place of one whose image went bad.
_MAX_STAND_INS: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one step trains on. All tensors on the CPU."""

    epoch: int
    index: int
    images_B3HW: Tensor  # float32, preprocessed
    tokens_BL: Tensor  # int64
    image_ids_B: Tensor  # int64
    caption_ids_B: Tensor  # int64


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch whose images are being decoded. `places` are its rows' places in the split."""

    epoch: int
    index: int
    places: list[int]
    images: list[Future[Pixels]]


class Loader:
    """Shuffled batches, whole ones only: the rest of an epoch that fills no batch is left out, another each
    time.

    Args:
        pairs: the training split.
        decoder: opens, augments and preprocesses an image.
        tokenize: texts → int64 [B, L].
        batch_size: pairs in a batch, at most `len(pairs)`.
        seed: of order, augmentation and stand-ins.
        workers: decoding processes; 0: threads of this one.
        max_bad: rows that may go bad while training.
        bad_rows: rows that had gone bad before a resume.
        on_bad_row: told about each row at the first time that its image cannot be read.
        on_workers_lost: told when the decoding processes died; threads go on in their place.
    """

    def __init__(
        self,
        pairs: Pairs,
        decoder: Decoder,
        tokenize: Callable[[Sequence[str]], Tensor],
        *,
        batch_size: int,
        seed: int,
        workers: int | None = 0,
        max_bad: int = 0,
        bad_rows: Sequence[int] = (),
        on_bad_row: Callable[[Pair, str], None] = lambda pair, reason: None,
        on_workers_lost: Callable[[], None] = lambda: None,
    ) -> None:
        workers = workers or 0
        self._pairs, self._decoder, self._tokenize = pairs, decoder, tokenize
        self._batch_size, self._seed, self._max_bad = batch_size, seed, max_bad
        self._on_bad_row, self._on_workers_lost = on_bad_row, on_workers_lost
        self.bad_rows = set(bad_rows)
        self._pool: Executor = process_pool(workers, decoder) if workers else thread_pool()
        self._in_processes = workers > 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self._pairs) // self._batch_size

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """The batches of steps `first_step` (from 0) up to `total_steps`, in order.

        Raises:
            DataError: more rows went bad than `max_bad`.
        """
        pending: deque[_Pending] = deque()
        for step in range(first_step, total_steps):
            while len(pending) <= _AHEAD and step + len(pending) < total_steps:
                pending.append(self._begin(step + len(pending)))
            yield self._finish(pending.popleft())

    def _begin(self, step: int) -> _Pending:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self._seed, epoch, len(self._pairs)))
        places = self._order[1][index * self._batch_size : (index + 1) * self._batch_size]
        return _Pending(epoch, index, places, [self._submit(place, epoch) for place in places])

    def _submit(self, place: int, epoch: int) -> Future[Pixels]:
        pair = self._pairs.pairs[place]
        if self._in_processes:
            try:
                return self._pool.submit(work, pair.image, epoch, pair.row)
            except BrokenProcessPool:
                self._fall_back()
        return self._pool.submit(self._decoder, pair.image, epoch, pair.row)

    def _finish(self, batch: _Pending) -> Batch:
        places: list[int] = []
        images: list[Pixels] = []
        for place, future in zip(batch.places, batch.images, strict=True):
            seen, image = self._image(place, batch.epoch, future)
            places.append(seen)
            images.append(image)
        return Batch(
            epoch=batch.epoch,
            index=batch.index,
            images_B3HW=torch.from_numpy(np.stack(images)),
            tokens_BL=self._tokenize([self._pairs.pairs[place].caption for place in places]),
            image_ids_B=torch.from_numpy(self._pairs.image_ids[places]),
            caption_ids_B=torch.from_numpy(self._pairs.caption_ids[places]),
        )

    def _image(self, place: int, epoch: int, future: Future[Pixels]) -> tuple[int, Pixels]:
        """The row's image, or a stand-in's place and image: the same one whenever the run is repeated."""
        pair = self._pairs.pairs[place]
        try:
            return place, future.result()
        except BrokenProcessPool:
            self._fall_back()
            return self._image(place, epoch, self._submit(place, epoch))
        except (CliptuneError, OSError) as error:
            self._count_bad(pair, error)
        random = np.random.default_rng([self._seed, epoch, pair.row, 2])
        for stand_in in random.integers(0, len(self._pairs), size=_MAX_STAND_INS).tolist():
            other = self._pairs.pairs[stand_in]
            try:
                return stand_in, self._decoder(other.image, epoch, other.row)
            except (CliptuneError, OSError) as error:
                self._count_bad(other, error)
        raise DataError(
            f"row {pair.row} and {_MAX_STAND_INS} others in its place cannot be read", row=pair.row
        )

    def _count_bad(self, pair: Pair, error: CliptuneError | OSError) -> None:
        if pair.row in self.bad_rows:
            return
        self.bad_rows.add(pair.row)
        reason = error.message if isinstance(error, CliptuneError) else error.strerror or str(error)
        if len(self.bad_rows) > self._max_bad:
            raise DataError(
                f"{len(self.bad_rows)} rows became unreadable while training, more than data.max_bad_fraction"
                f" allows; the last is row {pair.row}: {pair.image.name}: {reason}",
                file=pair.image,
                row=pair.row,
            )
        self._on_bad_row(pair, f"{pair.image.name}: {reason}")

    def _fall_back(self) -> None:
        """Decoding processes died (of memory, mostly): decode in threads from here on."""
        if not self._in_processes:
            return
        self._in_processes = False
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = thread_pool()
        self._on_workers_lost()


def epoch_order(seed: int, epoch: int, rows: int) -> list[int]:
    """The places of an epoch's rows, shuffled."""
    return [int(place) for place in np.random.default_rng([seed, epoch, 0]).permutation(rows)]
