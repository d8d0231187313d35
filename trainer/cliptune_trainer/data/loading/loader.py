"""Batches of image-caption pairs, decoded ahead of the step that needs them.

Enters: pairs and a model's preprocessing. Leaves: `Batch`es, one for each step. Called by the loop and by
preparation. Which rows a step sees and how they are augmented is a pure function of (seed, step), so a loader
is restored by telling it the step to begin with. What is told (bad rows, lost processes) is told in the
caller's thread, with the batch that it concerns, however far ahead it was found.

B: pairs in a batch, L: tokens, H, W: image height and width, D: embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Self

from torch import Tensor

from cliptune.errors import DataError
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.hard_captions import HardCaptions
from cliptune_trainer.data.labels import Labels
from cliptune_trainer.data.loading.assembly import Assembled, Assembly, Recipe
from cliptune_trainer.data.loading.decode import Decoder
from cliptune_trainer.data.loading.images import Images, Normalisation
from cliptune_trainer.data.loading.known import KnownFeatures
from cliptune_trainer.data.loading.pools import Pool, open_pool
from cliptune_trainer.data.loading.transfer import Carrier
from cliptune_trainer.data.table import Pair
from cliptune_trainer.image.augment import NONE, Augmentation
from cliptune_trainer.losses.entry import LABELS, NEGATIVE_CAPTIONS
from cliptune_trainer.resolution.schedule import Size, SizeSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one step trains on, on the CPU or on the model's device already: `.to(device)` before use.

    A slice of `images_B3HW` is float32, preprocessed.
    """

    epoch: int
    index: int
    images_B3HW: Tensor | Images
    tokens_BL: Tensor  # int64; L: the shortest of a few lengths that holds the batch's texts
    image_ids_B: Tensor  # int64
    caption_ids_B: Tensor  # int64
    labels_BC: Tensor | None = None  # float32: 1 where a row bears a label
    negative_tokens_BL: Tensor | None = None  # int64: captions that are nearly right
    negative_ids_B: Tensor | None = None  # int64: their caption ids; see `losses.Contrast`
    image_features_BD: Tensor | None = None  # float32: what a frozen tower makes of the images
    text_features_BD: Tensor | None = None  # the same of the captions


class Loader:
    """Shuffled batches, whole ones only: the rest of an epoch that fills no batch is left out, another each
    time.

    Args:
        pairs: the training split.
        clip: the model: how it preprocesses and tokenises, and where it is.
        batch_size: pairs in a batch, at most `len(pairs)`.
        seed: of order, augmentation and stand-ins.
        augmentation: changes to images, drawn anew in each epoch.
        sizes: of images, step by step, each with its augmentation. None: the model's own, and `augmentation`.
        exact: decode as open_clip's evaluation transform does, to the bit; otherwise quicker (`Decoder`).
        known: features of frozen towers, to be brought with each batch.
        needs: of the loss: "labels" and "negative_captions" are brought with each batch.
        workers: decoding processes; 0: threads of this one.
        max_bad: rows that may go bad while training.
        bad_rows: rows that had gone bad before a resume.
        on_bad_row: told about each row at the first time that its image cannot be read.
        on_workers_lost: told when the decoding processes died or cannot be had; threads take their place.
    """

    def __init__(
        self,
        pairs: Pairs,
        clip: Clip,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation = NONE,
        sizes: SizeSchedule | None = None,
        exact: bool = True,
        known: KnownFeatures | None = None,
        needs: Collection[str] = (),
        workers: int = 0,
        max_bad: int = 0,
        bad_rows: Sequence[int] = (),
        on_bad_row: Callable[[Pair, str], None] = lambda pair, reason: None,
        on_workers_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._known = known or KnownFeatures()
        schedule = sizes or SizeSchedule.fixed(clip.image_size, augmentation, 0)

        @cache
        def decoder(size: Size, augmentation: Augmentation) -> Decoder:
            return Decoder.of(
                clip.preprocess_config | ({} if size == clip.image_size else {"size": size}),
                augmentation=augmentation,
                seed=seed,
                exact=exact,
                reading=pairs.reading,
            )

        def decoder_of(step: int) -> Decoder:
            look = schedule.at(step)
            return decoder(look.size, look.augmentation)

        self._largest = decoder(max(schedule.sizes, key=math.prod), augmentation)
        self._recipe = Recipe(
            pairs=pairs,
            decoder_of=decoder_of,
            tokenize=clip.tokenize_trimmed,
            batch_size=batch_size,
            seed=seed,
            labels=Labels.of(pairs) if LABELS in needs else None,
            hard_captions=HardCaptions.of(pairs, seed) if NEGATIVE_CAPTIONS in needs else None,
            text_rows=self._known.text_rows,
        )
        self._normalisation = Normalisation.of(clip.preprocess_config, clip.device)
        self._carrier = Carrier(clip.device)
        self._max_bad, self._on_bad_row, self._on_workers_lost = max_bad, on_bad_row, on_workers_lost
        self.bad_rows = set(bad_rows)
        self._pool = self._open_pool(workers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._running: tuple[Assembly, Future[Assembled] | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._thread.shutdown(wait=True)
        self._pool.close()

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self._recipe.steps_per_epoch

    @property
    def process_ids(self) -> list[int]:
        """Of the decoding processes; none: threads decode."""
        return (self._running[0].pool if self._running else self._pool).process_ids

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """The batches of steps `first_step` (from 0) up to `total_steps`, in order. One iteration at a time:
        the one before ends here.

        Raises:
            DataError: more rows went bad than `max_bad`.
        """
        self._end()
        assembly = Assembly(self._recipe, self._pool, self._carrier, first_step, total_steps)
        upcoming = self._thread.submit(assembly) if first_step < total_steps else None
        self._running = (assembly, upcoming)
        for step in range(first_step, total_steps):
            if upcoming is None or self._running is None or self._running[0] is not assembly:
                raise RuntimeError("these batches were ended")
            assembled = upcoming.result()
            # The step that gets this batch runs while the next one is put together.
            upcoming = self._thread.submit(assembly) if step + 1 < total_steps else None
            self._running = (assembly, upcoming)
            yield self._deliver(assembled)

    def _deliver(self, assembled: Assembled) -> Batch:
        if assembled.workers_lost:
            self._on_workers_lost()
        for pair, reason in assembled.bad:
            self._count_bad(pair, reason)
        if assembled.error is not None:
            raise assembled.error
        epoch, index = divmod(assembled.step, self.steps_per_epoch)
        pixels_BHW3, tokens_BL, image_ids_B, caption_ids_B, *more = assembled.transfer.arrive()
        further = dict(zip(assembled.further, more, strict=True))
        return Batch(
            epoch=epoch,
            index=index,
            images_B3HW=Images(pixels_BHW3, self._normalisation, further.get("mixes")),
            tokens_BL=tokens_BL,
            image_ids_B=image_ids_B,
            caption_ids_B=caption_ids_B,
            labels_BC=further.get("labels"),
            negative_tokens_BL=further.get("negative_tokens"),
            negative_ids_B=further.get("negative_ids"),
            image_features_BD=self._known.of_images(image_ids_B),
            text_features_BD=self._known.of_texts(further.get("text_rows")),
        )

    def _count_bad(self, pair: Pair, reason: str) -> None:
        if pair.row in self.bad_rows:
            return
        self.bad_rows.add(pair.row)
        if len(self.bad_rows) > self._max_bad:
            raise DataError(
                f"{len(self.bad_rows)} rows became unreadable while training, more than data.max_bad_fraction"
                f" allows; the last is row {pair.row}: {pair.image.name}: {reason}",
                file=pair.image,
                row=pair.row,
            )
        self._on_bad_row(pair, f"{pair.image.name}: {reason}")

    def _open_pool(self, workers: int) -> Pool:
        decoder, batch_size = self._largest, self._recipe.batch_size
        try:
            return open_pool(decoder, workers=workers, batch_size=batch_size)
        except OSError:  # no shared memory
            self._on_workers_lost()
            return open_pool(decoder, workers=0, batch_size=batch_size)

    def _end(self) -> None:
        """Ends the iteration that is under way, if there is one."""
        if self._running is None:
            return
        assembly, upcoming = self._running
        self._running = None
        assembly.stop()
        if upcoming is not None and not upcoming.cancel():
            wait([upcoming])
        assembly.abandon()
        self._pool = assembly.pool
