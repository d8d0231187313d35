"""Whether the plan's estimate is right: real parts of a batch, on the device, a few times.

Enters: ways to compute a batch, and what measures one. Leaves: the way that is fastest in truth, with the
largest micro-batch that fits. Called by `run` on accelerators, before the first step.
B: pairs, L: tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from cliptune_model.attention import install, uninstall
from cliptune_model.clip import Clip
from cliptune_model.machine.synchronize import synchronize
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.memory.plan import Demand, Way, even_parts, passes
from cliptune_trainer.out_of_memory import is_out_of_memory
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.batch_norm import BatchNorms
from cliptune_trainer.steps.checkpointing import disable_checkpointing, enable_checkpointing
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.replay import RandomState
from cliptune_trainer.steps.step import release_memory

MAX_PROBES: Final = 10
# Of the most promising way, before the next is tried; of each further one, which begins better informed.
_FIRST_PROBES: Final = 4
_LATER_PROBES: Final = 2
# A larger micro-batch is tried when so much more would fit.
_WORTH_GROWING: Final = 1.15
# What is aimed at of the room that is left: the next probe shall fit.
_AIM: Final = 0.99
# CUDA's allocator needs room between its tensors.
_FRAGMENTS: Final = 1.04


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A probe's outcome.

    Attributes:
        peak_bytes: on the device, of one part with gradients and optimizer state there; None: it did not fit.
        pair_s: seconds of a pair in one part, forward and backward.
    """

    peak_bytes: int | None
    pair_s: float = 0.0


Measure = Callable[[Way], Measured]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """The fastest way that was found to fit. `probes`: how many it took."""

    way: Way
    probes: int


def search(demand: Demand, found: Sequence[Way], measure: Measure) -> Probed | None:
    """Measures the most promising ways at growing or shrinking micro-batches; None: nothing fitted.

    At most `MAX_PROBES` measurements.
    """
    best: tuple[float, Way] | None = None
    probes, error = 0, 1.0
    for place, way in enumerate(found):
        allowed = min(_FIRST_PROBES if place == 0 else _LATER_PROBES, MAX_PROBES - probes)
        outcome = _search_way(demand, _corrected(demand, way, error), measure, allowed)
        probes += outcome.probes
        if outcome.measured_pair_bytes:
            # Ways of one model on one device err alike.
            error = outcome.measured_pair_bytes / way.estimate.pair_bytes
        if outcome.way is not None and (best is None or outcome.pair_s < best[0]):
            best = (outcome.pair_s, outcome.way)
        if best is not None and best[1].micro_batch_size == demand.batch_size and not best[1].checkpointing:
            break  # one pass over everything: no other way can be faster
    return None if best is None else Probed(way=best[1], probes=probes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """Of one way: what fitted and was fastest, seconds of a pair in a whole step, and bytes of a pair."""

    way: Way | None
    pair_s: float
    probes: int
    measured_pair_bytes: int


def _corrected(demand: Demand, way: Way, error: float) -> Way:
    """The way by an estimate that errs as those before did."""
    if error == 1.0:
        return way
    estimate = replace(way.estimate, pair_bytes=max(1, int(way.estimate.pair_bytes * error)))
    most = min(int(estimate.pairs_within(demand.budget_bytes) * _AIM), demand.most)
    pairs = way.micro_batch_size if demand.micro_batch_size else even_parts(demand.batch_size, max(most, 1))
    return replace(way, estimate=estimate, micro_batch_size=pairs)


def _search_way(demand: Demand, way: Way, measure: Measure, allowed: int) -> _Outcome:
    fits, too_large, probes, slope = 0, demand.most + 1, 0, 0
    best: tuple[float, Way] | None = None
    while probes < allowed:
        outcome = measure(way)
        probes += 1
        pairs, peak = way.micro_batch_size, outcome.peak_bytes
        if peak is not None:
            # The line through what is known to be fixed and what was measured.
            slope = max(1, (peak - way.estimate.fixed_bytes) // pairs)
            way = replace(way, estimate=replace(way.estimate, pair_bytes=slope))
        room = int(way.estimate.pairs_within(demand.budget_bytes) * _AIM)
        if peak is not None and peak <= demand.budget_bytes:
            fits = pairs
            seconds = outcome.pair_s * _share(demand, way)
            if best is None or seconds < best[0]:
                best = (seconds, way)
            target = min(room, too_large - 1, demand.most)
            if target < fits * _WORTH_GROWING:
                break
        else:
            too_large = pairs
            target = max(fits + 1, min(room if peak is not None else pairs // 2, pairs - 1))
        target = even_parts(demand.batch_size, target)
        if demand.micro_batch_size is not None or not fits < target < too_large:
            break
        way = replace(way, micro_batch_size=target)
    seconds, fitting = best or (0.0, None)
    return _Outcome(way=fitting, pair_s=seconds, probes=probes, measured_pair_bytes=slope)


def _share(demand: Demand, way: Way) -> float:
    """Time of a whole step against that of its parts' forward and backward passes alone."""
    alone = passes(1, 1, checkpointing=way.checkpointing)
    return passes(demand.batch_size, way.micro_batch_size, checkpointing=way.checkpointing) / alone


class DeviceProbe:
    """Measures ways on the model's own device, with the model itself, which it leaves as it found it.

    Args:
        clip: the model, without attention blocks and checkpointing.
        precision: of the towers.
        text_tokens: length that texts have.
        extra_bytes: what a whole step needs beside one part's activations: features and loss.
    """

    def __init__(self, clip: Clip, precision: Precision, *, text_tokens: int, extra_bytes: int) -> None:
        # Whatever the job's objective is: what it takes over a whole batch is in `extra_bytes`.
        self._clip, self._objective, self._precision = clip, Objective(), precision
        self._text_tokens, self._extra_bytes = text_tokens, extra_bytes

    def __call__(self, way: Way) -> Measured:
        """Two parts, the second with gradients in place, timed."""
        clip, device = self._clip, self._clip.device
        with self._as_before():
            batch = self._batch(way.micro_batch_size)
            install(clip.model, way.attention)
            if way.checkpointing:
                enable_checkpointing(clip)
            # What the optimizer will hold, if it does not yet.
            moments = [torch.empty_like(weight) for weight in self._trained() for _ in range(2)]
            release_memory(device)
            retries = _start_counting(device)
            pair_s = self._timed(batch)
            peak, thrashed = _counted(device, retries)
            del moments
            if pair_s is None or thrashed:
                return Measured(peak_bytes=None)
            return Measured(peak_bytes=peak + self._extra_bytes, pair_s=pair_s)

    def _timed(self, batch: Batch) -> float | None:
        """Seconds of a pair; None: memory ran out. What it held is free when this returns."""
        device = str(self._clip.device)
        try:
            self._part(batch)
            synchronize(device)
            began = time.perf_counter()
            self._part(batch)
            synchronize(device)
            return (time.perf_counter() - began) / len(batch.tokens_BL)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _part(self, batch: Batch) -> None:
        accumulate(self._clip, self._objective, self._precision, batch, len(batch.tokens_BL))

    def _trained(self) -> list[Tensor]:
        return [weight for weight in self._clip.model.parameters() if weight.requires_grad]

    def _batch(self, pairs: int) -> Batch:
        device = self._clip.device
        height, width = self._clip.image_size
        rows_B = torch.arange(pairs, device=device)
        return Batch(
            epoch=0,
            index=0,
            images_B3HW=torch.zeros(pairs, 3, height, width, device=device),
            tokens_BL=torch.ones(pairs, self._text_tokens, dtype=torch.int64, device=device),
            image_ids_B=rows_B,
            caption_ids_B=rows_B,
        )

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Afterwards the model, its statistics, the generators and the memory are as they were."""
        model, device = self._clip.model, self._clip.device
        random, norms, training = RandomState.capture(device), BatchNorms(model), model.training
        statistics = norms.capture()
        model.train()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            model.train(training)
            norms.restore(statistics)
            random.restore()
            disable_checkpointing(self._clip)
            uninstall(model)
            release_memory(device)


def _start_counting(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def _counted(device: torch.device, retries: int) -> tuple[int, bool]:
    """Peak bytes, and whether the allocator had to give memory back to find room: too tight to be fast."""
    if device.type == "cuda":
        now = int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
        return int(torch.cuda.max_memory_allocated(device) * _FRAGMENTS), now > retries
    if device.type == "mps":
        # Heaps stay until they are released: what the driver holds now is the most that it held.
        return torch.mps.driver_allocated_memory(), False
    return 0, False
