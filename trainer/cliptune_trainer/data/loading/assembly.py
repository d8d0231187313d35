"""From the order of an epoch to whole batches, ahead of the step that needs them.

Enters: rows in the order in which steps use them. Leaves: `Assembled` batches, one after another. Runs in the
loader's own thread; that thread hands chunks of rows to a pool, collects their pixels in order, puts
stand-ins where an image cannot be read, tokenises, and starts the copy to the device.

B: pairs in a batch, L: tokens, H, W: image height and width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from cliptune.errors import CliptuneError, DataError
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.hard_captions import HardCaptions
from cliptune_trainer.data.labels import Labels
from cliptune_trainer.data.loading.decode import Bytes4, Decoder, Pixels, reason
from cliptune_trainer.data.loading.pools import Chunk, Pool, Threads
from cliptune_trainer.data.loading.transfer import Carrier, Transfer
from cliptune_trainer.data.source import Request
from cliptune_trainer.data.table import Pair
from cliptune_trainer.losses.contrast import NO_CAPTION

# Draws come from streams of their own; see also `augment`.
_CAPTION_STREAM: Final = 16
# Rows tried in place of one whose image went bad.
_MAX_STAND_INS: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What batches are made of: all that which rows a step sees, and how, depends on.

    `decoder_of`: a step's, for images have the same size within a step only. `text_rows`: of a table that
    captions are looked up in.
    """

    pairs: Pairs
    decoder_of: Callable[[int], Decoder]
    tokenize: Callable[[Sequence[str]], Tensor]
    batch_size: int
    seed: int
    labels: Labels | None = None
    hard_captions: HardCaptions | None = None
    text_rows: Mapping[str, int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self.pairs) // self.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembled:
    """A batch, and what went wrong on the way.

    Attributes:
        step: that it is for.
        transfer: of pixels, tokens, image ids, caption ids, and of what `further` names.
        further: "mixes" of colours, "labels", "negative_tokens" and "negative_ids", "text_rows", where there
            are any.
        bad: rows whose image cannot be read, and why, in the order in which that was found.
        error: no stand-in was found.
        workers_lost: the pool's processes died.
    """

    step: int
    transfer: Transfer
    further: tuple[str, ...]
    bad: tuple[tuple[Pair, str], ...]
    error: DataError | None
    workers_lost: bool


class Assembly:
    """The batches of steps `first_step` up to `total_steps`; call it once for each. Used by one thread.

    Args:
        recipe: what the batches are made of.
        pool: decodes; threads take its place should its processes die.
        carrier: to the device.
        first_step, total_steps: counted from 0 over all epochs.
    """

    def __init__(
        self, recipe: Recipe, pool: Pool, carrier: Carrier, first_step: int, total_steps: int
    ) -> None:
        self.pool = pool
        self._recipe, self._carrier = recipe, carrier
        # Requests run ahead of assembly, into the next epoch: both epochs are kept.
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(recipe.seed, epoch, len(recipe.pairs)))
        self._draws = lru_cache(maxsize=1)(lambda epoch: caption_draws(recipe.seed, epoch, len(recipe.pairs)))
        self._step = first_step
        self._requests = self._all_requests(first_step, total_steps)
        self._waiting: deque[Chunk] = deque()
        self._workers_lost = self._stopped = False

    def __call__(self) -> Assembled:
        """The next batch; its images are decoded when this returns."""
        recipe, step = self._recipe, self._step
        self._step += 1
        epoch, places = self._places(step)
        decoder = recipe.decoder_of(step)
        pixels_BHW3 = self._carrier.empty((len(places), *decoder.shape), torch.uint8)
        bad, error = self._collect(pixels_BHW3.numpy(), places, epoch, decoder)
        self._top_up()
        pairs = recipe.pairs
        captions = self._captions(epoch, places)
        tokens_BL, further = self._texts(captions, places, epoch)
        if recipe.text_rows is not None:
            further["text_rows"] = torch.tensor([recipe.text_rows[caption] for caption in captions])
        tensors = [
            pixels_BHW3,
            tokens_BL,
            torch.from_numpy(pairs.image_ids[places]),
            torch.from_numpy(pairs.caption_ids[places]),
        ]
        augmentation = decoder.augmentation
        if augmentation.colours:
            rows = [pairs.pairs[place].row for place in places]
            further["mixes"] = torch.from_numpy(augmentation.mixes(recipe.seed, epoch, rows))
        if recipe.labels is not None:
            further["labels"] = recipe.labels.multi_hot(places)
        lost, self._workers_lost = self._workers_lost, False
        return Assembled(
            step=step,
            transfer=self._carrier.begin([*tensors, *further.values()]),
            further=tuple(further),
            bad=bad,
            error=error,
            workers_lost=lost,
        )

    def _texts(self, captions: list[str], places: list[int], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens of the captions, and of wrong ones in the same length if there shall be some."""
        hard, count = self._recipe.hard_captions, len(captions)
        if hard is None:
            return self._recipe.tokenize(captions), {}
        drawn = [hard.draw(caption, epoch, place) for caption, place in zip(captions, places, strict=True)]
        wrong = [caption if other is None else other for caption, other in zip(captions, drawn, strict=True)]
        tokens_NL = self._recipe.tokenize([*captions, *wrong])
        ids = [NO_CAPTION if other is None else hard.id_of(other) for other in drawn]
        return tokens_NL[:count], {"negative_tokens": tokens_NL[count:], "negative_ids": torch.tensor(ids)}

    def stop(self) -> None:
        """Lets a call that is under way end soon, with `CancelledError`. From any thread."""
        self._stopped = True

    def abandon(self) -> None:
        """Gives back what was decoded ahead. After the last call."""
        wait([chunk.reasons for chunk in self._waiting if not chunk.reasons.cancel()])
        while self._waiting:
            self.pool.release(self._waiting.popleft())

    def _captions(self, epoch: int, places: Sequence[int]) -> list[str]:
        """The rows' captions; of a row with several to choose from, the epoch's."""
        pairs, captions = self._recipe.pairs.pairs, []
        for place in places:
            pair = pairs[place]
            variants = pair.variants or (pair.caption,)
            drawn = int(self._draws(epoch)[place] * len(variants)) if len(variants) > 1 else 0
            captions.append(variants[drawn])
        return captions

    def _places(self, step: int) -> tuple[int, list[int]]:
        """The epoch of a step, and the places of its rows in the split."""
        epoch, index = divmod(step, self._recipe.steps_per_epoch)
        start = index * self._recipe.batch_size
        return epoch, self._order(epoch)[start : start + self._recipe.batch_size].tolist()

    def _all_requests(self, first_step: int, total_steps: int) -> Iterator[tuple[Sequence[Request], Decoder]]:
        """Chunks in the order of use, and what decodes them; none spans two steps."""
        pairs = self._recipe.pairs.pairs
        rows = self.pool.rows
        for step in range(first_step, total_steps):
            epoch, places = self._places(step)
            decoder = self._recipe.decoder_of(step)
            for start in range(0, len(places), rows):
                requests = [
                    Request(pairs[place].image, epoch, pairs[place].row)
                    for place in places[start : start + rows]
                ]
                yield requests, decoder

    def _top_up(self) -> None:
        """Keeps the pool busy, as far ahead as it has room for."""
        while len(self._waiting) < self.pool.capacity and (upcoming := next(self._requests, None)):
            self._waiting.append(self._submit(*upcoming))

    def _submit(self, requests: Sequence[Request], decoder: Decoder) -> Chunk:
        try:
            return self.pool.submit(requests, decoder)
        except BrokenProcessPool:
            self._fall_back()
            return self.pool.submit(requests, decoder)

    def _fall_back(self) -> None:
        """Decoding processes died (of memory, mostly): decode in threads from here on."""
        broken, self.pool = self.pool, Threads(rows=self.pool.rows, capacity=self.pool.capacity)
        unfinished = [(chunk.requests, chunk.decoder) for chunk in self._waiting]
        self._waiting.clear()
        broken.close()
        self._waiting.extend(self.pool.submit(requests, decoder) for requests, decoder in unfinished)
        self._workers_lost = True

    def _collect(
        self, pixels_BHW3: Bytes4, places: list[int], epoch: int, decoder: Decoder
    ) -> tuple[tuple[tuple[Pair, str], ...], DataError | None]:
        """Fills `pixels_BHW3`. Where an image cannot be read, a stand-in takes its place, in `places` too."""
        bad: list[tuple[Pair, str]] = []
        error: DataError | None = None
        filled = 0
        while filled < len(places):
            if self._stopped:
                raise CancelledError
            self._top_up()
            try:
                reasons = self._waiting[0].reasons.result()
            except BrokenProcessPool:
                self._fall_back()
                continue
            chunk = self._waiting.popleft()
            pixels_BHW3[filled : filled + len(reasons)] = chunk.pixels_NHW3
            self.pool.release(chunk)
            for row, why in enumerate(reasons, start=filled):
                if why:
                    bad.append((self._recipe.pairs.pairs[places[row]], why))
                    try:
                        places[row], pixels_BHW3[row] = self._stand_in(places[row], epoch, bad, decoder)
                    except DataError as caught:
                        error = error or caught
            filled += len(reasons)
        return tuple(bad), error

    def _stand_in(
        self, place: int, epoch: int, bad: list[tuple[Pair, str]], decoder: Decoder
    ) -> tuple[int, Pixels]:
        """Another row's place and image: the same one whenever the run is repeated."""
        pairs = self._recipe.pairs.pairs
        random = np.random.default_rng([self._recipe.seed, epoch, pairs[place].row, 2])
        for other in random.integers(0, len(pairs), size=_MAX_STAND_INS).tolist():
            try:
                return other, decoder(pairs[other].image, epoch, pairs[other].row)
            except (CliptuneError, OSError) as error:
                bad.append((pairs[other], reason(error)))
        raise DataError(
            f"row {pairs[place].row} and {_MAX_STAND_INS} others in its place cannot be read",
            row=pairs[place].row,
        )


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The places of an epoch's rows, shuffled."""
    return np.random.default_rng([seed, epoch, 0]).permutation(rows)


def caption_draws(seed: int, epoch: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """For each row of an epoch where in [0, 1) its draw of a caption falls."""
    return np.random.default_rng([seed, epoch, _CAPTION_STREAM]).random(rows)
