"""What a batch costs that goes through the towers in parts: whole steps beside the same step in one part.

The price of exactness is a forward pass more, about a third of a step. Beside it open_clip's own accumulation
(`accum_freq`, its training loop's arithmetic): its time, and how far its gradient is from the whole batch's,
where ours differs by rounding alone. On a GPU `work cost` is the same ratio in seconds that its kernels run:
where `ours cost` is far above it, the parts are so small that the GPU waits for the host; `launches` are the
kernels that a step gives it. `--half-weights off` leaves the casts of weights to autocast. The second table
takes an effective batch that no GPU holds at once within a budget of memory: ViT-L/14 with 32,768 pairs in
24 GiB on an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bench.record import Columns, cores, gpu, report
from bench.turns import medians, seconds
from cliptune_model.acceleration.compiled import compile_towers
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.machine.synchronize import synchronize
from cliptune_model.source import ModelSource
from cliptune_trainer.data.loading.images import Images, Normalisation
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.data.loading.transfer import Carrier
from cliptune_trainer.losses import choose_tiling
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.memory.count import LiveBytes
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.half_weights import HalfWeights, choose_half_weights
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.parts import parts_of
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step, StepOutOfMemoryError

CAPTION_TOKENS: Final = 24
CLIP_NORM: Final = 1.0
LEARNING_RATE: Final = 1e-5
# What the loss may take; beyond it goes in tiles.
LOSS_BYTES: Final = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, its effective batch and the micro-batches to try."""

    model: str
    batch: int
    micro_batches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What is run on a kind of device: the comparisons, and the large batch within its budget."""

    precision: str
    cases: tuple[Case, ...]
    large: Case
    budget_gib: float


FORMS: Final = {
    "cuda": Form(
        precision="bf16",
        cases=(
            Case(model="ViT-B-32", batch=1024, micro_batches=(512, 256)),
            Case(model="ViT-L-14", batch=192, micro_batches=(96, 48)),
        ),
        large=Case(model="ViT-L-14", batch=32_768, micro_batches=(64,)),
        budget_gib=24,
    ),
    "cpu": Form(
        precision="fp32",
        cases=(Case(model="ViT-B-32", batch=32, micro_batches=(16, 8)),),
        large=Case(model="cliptune-tiny-vit", batch=256, micro_batches=(16,)),
        budget_gib=1,
    ),
}


def noise(clip: Clip, rows: int) -> Batch:
    """Random pixels as the loader hands them over, bytes, on the device if they are not too many; and texts
    of one length."""
    random = np.random.default_rng(0)
    height, width = clip.image_size
    some = random.integers(0, 256, (min(rows, 1024), height, width, 3), dtype=np.uint8)
    carrier = Carrier(clip.device)
    pixels_BHW3 = carrier.empty((rows, height, width, 3), torch.uint8)
    for start in range(0, rows, len(some)):
        pixels_BHW3[start : start + len(some)] = torch.from_numpy(some[: rows - start])
    tokens_BL = torch.zeros(rows, clip.context_length, dtype=torch.int64)
    length = min(CAPTION_TOKENS, clip.context_length)
    tokens_BL[:, :length] = torch.from_numpy(random.integers(1, 49_000, (rows, length)))
    tokens_BL[:, length - 1] = 49_407
    pixels_BHW3, tokens_BL = carrier.begin([pixels_BHW3, clip.trim(tokens_BL)]).arrive()
    return Batch(
        epoch=0,
        index=0,
        images_B3HW=Images(pixels_BHW3, Normalisation.of(clip.preprocess_config, clip.device)),
        tokens_BL=tokens_BL,
        image_ids_B=torch.arange(rows),
        caption_ids_B=torch.arange(rows),
    )


class OpenClip:
    """Gradients as open_clip 3.3's training loop accumulates them; the towers are the same."""

    def __init__(self, clip: Clip, precision: Precision, batch: Batch) -> None:
        self._clip, self._precision, self._loss, self._batch = clip, precision, ClipLoss(), batch

    def __call__(self, micro_batch: int) -> None:
        """Adds the gradient of a batch to the parameters'."""
        parts = parts_of(len(self._batch.tokens_BL), micro_batch)
        if len(parts) == 1:
            return self._backward(*self._features(parts[0]))
        with torch.no_grad():
            cached = [self._features(rows) for rows in parts]
        for place, rows in enumerate(parts):
            here = self._features(rows)
            with self._precision.autocast():
                joined = (
                    torch.cat(
                        [
                            *(one[side] for one in cached[:place]),
                            here[side],
                            *(one[side] for one in cached[place + 1 :]),
                        ]
                    )
                    for side in (0, 1)
                )
                image_ND, text_ND = joined
            self._backward(image_ND, text_ND)
        return None

    def _features(self, rows: slice) -> tuple[Tensor, Tensor]:
        device, model = self._clip.device, self._clip
        with self._precision.autocast():
            image_bD = model.encode_images(self._batch.images_B3HW[rows].to(device))
            text_bD = model.encode_texts(self._batch.tokens_BL[rows].to(device))
            return F.normalize(image_bD, dim=-1), F.normalize(text_bD, dim=-1)

    def _backward(self, images: Tensor, texts: Tensor) -> None:
        with self._precision.autocast():
            loss = self._loss(images, texts, self._clip.model.logit_scale.exp())  # type: ignore[operator]
        loss.backward()


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Seconds that the GPU's kernels run, and how many there are, copies and fillings included."""

    busy_s: float
    launches: int


class Bench:
    """One model and batch on a device; each side computes and takes a step."""

    def __init__(self, case: Case, device: str, precision: str, *, half_weights: bool) -> None:
        self.device, self.case = device, case
        self.clip = build(ModelSource(name=case.model), device=device)
        self.clip.model.train()
        # As the trainer sets the towers up: uncompiled, a small part waits for the host, not for the GPU.
        make_lean(self.clip, choose_lean(self.clip))
        compiled = "on" if device == "cuda" else "off"
        compile_towers(self.clip, Choice(subject="compile", value=compiled, reason="as the trainer's"))
        self.precision = Precision(precision, device)
        self.batch = noise(self.clip, case.batch)
        tiling = choose_tiling(
            "infonce", "auto", case.batch, self.clip.embedding_dim, device, budget_bytes=LOSS_BYTES
        )
        tiled = tiling.value.isdigit()
        self.objective = Objective(block=int(tiling.value) if tiled else None)
        self.optimizer = build_optimizer(self.clip.model, learning_rate=LEARNING_RATE, weight_decay=0.1)
        choice = choose_half_weights(self.clip, precision, device)
        self.halves = HalfWeights.of(self.clip, self.precision, choice) if half_weights else None
        self.step = Step(
            self.clip,
            self.objective,
            self.optimizer,
            self.precision,
            clip_norm=CLIP_NORM,
            half_weights=self.halves,
        )
        self._open_clip = OpenClip(self.clip, self.precision, self.batch)

    def ours(self, micro_batch: int) -> None:
        """A step, in parts if the micro-batch is smaller than the batch."""
        self.step.micro_batch_size = micro_batch
        self.step(self.batch, LEARNING_RATE)
        synchronize(self.device)

    def theirs(self, micro_batch: int) -> None:
        """A step of open_clip's loop."""
        self._open_clip(micro_batch)
        torch.nn.utils.clip_grad_norm_(self.clip.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)

    def work(self, micro_batch: int) -> Work:
        """What a step is on the GPU."""
        steps = 3
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                self.ours(micro_batch)
        events = profiled.key_averages()
        busy_us = sum(event.self_device_time_total for event in events)
        return Work(
            busy_s=float(busy_us) / 1e6 / steps,
            launches=sum(event.count for event in events if event.self_device_time_total > 0) // steps,
        )

    def difference(self, micro_batch: int, *, ours: bool) -> float:
        """Relative difference between the gradient in parts and that of the whole batch."""
        whole, parted = (self._gradient(size, ours=ours) for size in (self.case.batch, micro_batch))
        return float((whole - parted).norm() / whole.norm())

    def _gradient(self, micro_batch: int, *, ours: bool) -> Tensor:
        if ours:
            accumulate(
                self.clip,
                self.objective,
                self.precision,
                self.batch,
                micro_batch,
                half_weights=self.halves,
            )
        else:
            self._open_clip(micro_batch)
        gradients = [
            parameter.grad for parameter in self.clip.model.parameters() if parameter.grad is not None
        ]
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        self.optimizer.zero_grad(set_to_none=True)
        return joined


def compared(
    case: Case, device: str, precision: str, repetitions: int, *, half_weights: bool
) -> list[Columns]:
    """A line for each micro-batch. Every side takes its turn in every round."""
    bench = Bench(case, device, precision, half_weights=half_weights)
    sides: dict[str, Callable[[], float]] = {"whole": seconds(lambda: bench.ours(case.batch))}
    for size in case.micro_batches:
        sides[f"ours {size}"] = seconds(lambda size=size: bench.ours(size))  # type: ignore[misc]
        sides[f"open_clip {size}"] = seconds(lambda size=size: bench.theirs(size))  # type: ignore[misc]
    found_s = medians(sides, repetitions)
    sizes = (case.batch, *case.micro_batches) if device == "cuda" else ()
    work = {size: bench.work(size) for size in sizes}
    return [
        {
            "model": case.model,
            "batch": case.batch,
            "micro_batch": size,
            "parts": len(parts_of(case.batch, size)),
            "half_weights": "on" if bench.halves else "off",
            "whole_s": found_s["whole"],
            "ours_s": found_s[f"ours {size}"],
            "open_clip_s": found_s[f"open_clip {size}"],
            "ours_cost": found_s[f"ours {size}"] / found_s["whole"],
            **(
                {
                    "work_cost": work[size].busy_s / work[case.batch].busy_s,
                    "launches": work[size].launches,
                    "whole_launches": work[case.batch].launches,
                }
                if work
                else {}
            ),
            "open_clip_cost": found_s[f"open_clip {size}"] / found_s["whole"],
            "ours_difference": bench.difference(size, ours=True),
            "open_clip_difference": bench.difference(size, ours=False),
        }
        for size in case.micro_batches
    ]


def within_budget(
    case: Case, device: str, precision: str, budget_gib: float, steps: int, *, half_weights: bool
) -> Columns:
    """An effective batch of any size in little memory; the micro-batch is halved until it fits."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gib * 2**30 / total))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bench = Bench(case, device, precision, half_weights=half_weights)
    micro_batch, peak_bytes = case.micro_batches[0], 0
    losses: list[float] = []
    times_s: list[float] = []
    while len(losses) < steps:
        bench.step.micro_batch_size = micro_batch
        began = time.perf_counter()
        try:
            if device == "cuda":
                result = bench.step(bench.batch, LEARNING_RATE)
                peak_bytes = torch.cuda.max_memory_reserved()
            else:
                with LiveBytes(device) as live:
                    for parameter in bench.clip.model.parameters():
                        live.adopt(parameter)
                    result = bench.step(bench.batch, LEARNING_RATE)
                peak_bytes = live.peak
        except StepOutOfMemoryError:
            micro_batch //= 2
            continue
        times_s.append(time.perf_counter() - began)
        losses.append(result.loss)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "model": case.model,
        "batch": case.batch,
        "micro_batch": micro_batch,
        "budget_gib": budget_gib,
        "peak_gib": peak_bytes / 2**30,
        "step_s": min(times_s),
        "pairs_per_s": case.batch / min(times_s),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    form = FORMS[device]
    parser.add_argument("--repetitions", type=int, default=5 if device == "cuda" else 3)
    parser.add_argument("--steps", type=int, default=1, help="of the large batch; 0: leave it out")
    parser.add_argument("--budget-gib", type=float, default=form.budget_gib, help="for the large batch")
    parser.add_argument(
        "--half-weights",
        choices=("auto", "off"),
        default="auto",
        help="auto: as the trainer has it; off: autocast casts the weights in every part",
    )
    arguments = parser.parse_args()
    half_weights = arguments.half_weights == "auto"
    where = gpu(torch.cuda.get_device_name()) if device == "cuda" else cores()
    rows: list[Columns] = []
    for case in form.cases:
        rows += compared(case, device, form.precision, arguments.repetitions, half_weights=half_weights)
        # After each model: the next takes minutes, and what is known by then is kept.
        report("accumulation", rows, device=where)
    if arguments.steps:
        large = within_budget(
            form.large,
            device,
            form.precision,
            arguments.budget_gib,
            arguments.steps,
            half_weights=half_weights,
        )
        report("accumulation", rows, device=where, more={"A batch that does not fit at once": [large]})


if __name__ == "__main__":
    main()
