"""Training steps a second beside open_clip's own: eager and compiled, the same model, batch and numbers.

Both sides: fp32 weights, towers under autocast (bf16 on a GPU, none on the CPU), features normalised and the
loss computed in fp32, AdamW, no clipping, random images and captions that lie on the device already, of which
a few batches repeat so that the loss falls. open_clip's side is its modules, its ClipLoss and its optimizer
with the parameter groups of its training script; compiled, both of its towers by `torch.compile` as it is.
Ours is the trainer's step. Every side begins with the same weights; the losses of the first steps are kept.

A share of the ceiling is the towers' products at the captions' own length, three times those of a forward
pass, over what one large matrix product reached in the same run.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, cast

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.record import Columns, cores, gpu, report
from bench.turns import medians, seconds
from cliptune_model.acceleration.compiled import compile_towers
from cliptune_model.acceleration.lean import PARTS, make_lean
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.machine.synchronize import synchronize
from cliptune_model.source import ModelSource
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.larger_parts import passes_of
from cliptune_trainer.steps.optim import BETAS, EPS, build_optimizer, takes_decay
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step, StepInFlight

START, END, WORDS = 49406, 49407, 40_000
# As for fine-tuning: at a rate for random weights, without warm-up, rounding alone parts the curves.
LEARNING_RATE, DECAY = 1e-5, 0.1
BATCHES: Final = 2
CASES: Final = {
    "cuda": [("ViT-B-32", 1024), ("ViT-B-16", 512), ("ViT-L-14", 192)],
    "cpu": [("ViT-B-32", 16)],
}
TOKENS: Final = {"cuda": 24, "cpu": 15}
# What a kernel or an operator is for, by its name; the first that matches.
KINDS: Final = {
    "optimizer": r"adam|multi_tensor|foreach",
    "attention": r"flash|fmha|scaled_dot|attention|softmax",
    "products": r"gemm|nvjet|cutlass|sm90_|sm80_|addmm|aten::mm|bmm|mkldnn|conv",
    "fused passes": r"triton|cpp_fused|graph_",
    "copies and casts": r"copy|memcpy|memset|cat|fill",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How our side runs. As the trainer decides by itself on a GPU, unless told otherwise."""

    trimmed: bool = True
    parts: tuple[str, ...] = PARTS
    compiled: str = "blocks"  # "", "blocks", "whole", or a mode of torch.compile for whole towers


Side = Callable[[], None]


class Workload:
    """One model, its batches on the device, and the sides that train on them."""

    def __init__(self, name: str, batch_size: int, tokens: int, device: str) -> None:
        self.name, self.batch_size, self.tokens, self.device = name, batch_size, tokens, device
        self.clip = build(ModelSource(name=name), device=device)
        self.precision = "bf16" if device == "cuda" else "fp32"
        generator = torch.Generator().manual_seed(0)
        self.batches = [self._batch(generator) for _ in range(BATCHES)]

    def _batch(self, generator: torch.Generator) -> Batch:
        rows, length = self.batch_size, self.clip.context_length
        tokens_BL = torch.randint(1, WORDS, (rows, length), generator=generator)
        tokens_BL[:, 0], tokens_BL[:, self.tokens - 1], tokens_BL[:, self.tokens :] = START, END, 0
        images_B3HW = torch.randn(rows, 3, *self.clip.image_size, generator=generator)
        places_B = torch.arange(rows)
        parts = (images_B3HW, tokens_BL, places_B, places_B)
        images, tokens, image_ids, caption_ids = (part.to(self.device) for part in parts)
        return Batch(
            epoch=0,
            index=0,
            images_B3HW=images,
            tokens_BL=tokens,
            image_ids_B=image_ids,
            caption_ids_B=caption_ids,
        )

    def forward_flops(self) -> int:
        """Of one pair, at the captions' own length: the towers as open_clip wrote them."""
        meta = copy.copy(self.clip)
        meta.model = copy.deepcopy(self.clip.model).to("meta")
        trimmed = self.clip.trim(self.batches[0].tokens_BL.cpu())[:1, : self.tokens]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            meta.model.train()
            meta.encode_images(torch.empty(1, 3, *self.clip.image_size, device="meta"))
            meta.encode_texts(trimmed.to("meta"))
        return int(counter.get_total_flops())

    def fresh(self) -> Clip:
        """The model with its first weights, to be trained."""
        clip = copy.copy(self.clip)
        clip.model = copy.deepcopy(self.clip.model).train()
        return clip


class Ours:
    """The trainer's step. `take` launches one and waits for the one before, as the loop does."""

    def __init__(self, workload: Workload, form: Form) -> None:
        self._clip = clip = workload.fresh()
        make_lean(clip, Choice(subject="lean_towers", value=", ".join(form.parts), reason="this benchmark"))
        self._batches = [
            replace(batch, tokens_BL=clip.trim(batch.tokens_BL.cpu()).to(workload.device))
            if form.trimmed
            else batch
            for batch in workload.batches
        ]
        precision = Precision(workload.precision, workload.device)
        began = time.perf_counter()
        if form.compiled:
            mode = {} if form.compiled in ("blocks", "whole") else {"config_patches": _patches(form.compiled)}
            on = Choice(subject="compile", value="on", reason="this benchmark")
            self.compilation = compile_towers(clip, on, whole=form.compiled != "blocks", options=mode)
            rows, tokens = self._batches[0].tokens_BL.shape
            self.compilation.warm_up(passes_of(clip, rows, rows, tokens), precision.autocast)
            if self.compilation.choice.value != "on":
                raise SystemExit(f"{workload.name}: {self.compilation.choice.reason}")
        self.compile_s = time.perf_counter() - began if form.compiled else 0.0
        optimizer = build_optimizer(clip.model, learning_rate=LEARNING_RATE, weight_decay=DECAY)
        self._step = Step(clip, Objective(), optimizer, precision, clip_norm=0.0)
        self._taken = 0
        self._flight: StepInFlight | None = None

    def take(self) -> float | None:
        """One step; the loss of the one before."""
        batch = self._batches[self._taken % BATCHES]
        self._taken += 1
        before, self._flight = self._flight, self._step.launch(batch, LEARNING_RATE)
        return None if before is None else before.result().loss

    def losses(self, steps: int) -> list[float]:
        """Of the next steps."""
        found = [self.take() for _ in range(steps)][1:]
        last = cast(StepInFlight, self._flight).result().loss
        self._flight = None
        return [*(loss for loss in found if loss is not None), last]


class _Towers(nn.Module):
    """Both of open_clip's towers, as one module to call or to compile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] and [B, L] → two of [B, D], not normalised."""
        model = cast(Any, self.model)
        return model.encode_image(images), model.encode_text(tokens)


class OpenClip:
    """The step of open_clip's training script, with features and loss in fp32 and nothing read in between."""

    def __init__(self, workload: Workload, *, compiled: bool) -> None:
        self._model = workload.fresh().model
        self._batches, self._loss = workload.batches, ClipLoss()
        self._autocast = Precision(workload.precision, workload.device).autocast
        towers = _Towers(self._model)
        self._towers: Callable[..., tuple[Tensor, Tensor]] = torch.compile(towers) if compiled else towers
        named = list(self._model.named_parameters())
        self._optimizer = AdamW(
            [
                {
                    "params": [value for name, value in named if not takes_decay(name, value)],
                    "weight_decay": 0.0,
                },
                {
                    "params": [value for name, value in named if takes_decay(name, value)],
                    "weight_decay": DECAY,
                },
            ],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPS,
        )
        self._taken = 0
        self.compile_s = 0.0
        if compiled:
            began = time.perf_counter()
            with self._autocast():
                self._towers(self._batches[0].images_B3HW, self._batches[0].tokens_BL)
            self.compile_s = time.perf_counter() - began

    def take(self) -> Tensor:
        """One step; its loss, on the device."""
        batch = self._batches[self._taken % BATCHES]
        self._taken += 1
        self._optimizer.zero_grad()
        with self._autocast():
            image_BD, text_BD = self._towers(batch.images_B3HW, batch.tokens_BL)
        scale = cast(nn.Parameter, self._model.logit_scale)
        loss = self._loss(
            F.normalize(image_BD.float(), dim=-1), F.normalize(text_BD.float(), dim=-1), scale.exp()
        )
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            scale.clamp_(0, math.log(100.0))
        return cast(Tensor, loss.detach())

    def losses(self, steps: int) -> list[float]:
        """Of the next steps."""
        return torch.stack([self.take() for _ in range(steps)]).tolist()


def _patches(mode: str) -> dict[str, object]:
    return cast(dict[str, object], torch._inductor.list_mode_options(mode))


def ceiling_tflops(device: str, precision: str) -> float:
    """What one large square product reaches, the best of ten."""
    side = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        one @ other
        synchronize(device)

    timed = seconds(product)
    timed()
    return 2 * side**3 / min(timed() for _ in range(10)) / 1e12


def measured(
    workload: Workload, ceiling: float, steps: int, repetitions: int
) -> tuple[Columns, list[Columns], list[Columns]]:
    """A row, its losses, and where the time of our step goes."""
    on_gpu = workload.device == "cuda"
    sides: dict[str, Ours | OpenClip] = {"ours": Ours(workload, Form())}
    if not on_gpu:
        sides["ours_uncompiled"] = Ours(workload, Form(compiled=""))
    sides["open_clip_eager"] = OpenClip(workload, compiled=False)
    if on_gpu:
        sides["open_clip_compiled"] = OpenClip(workload, compiled=True)
    losses = {name: side.losses(steps) for name, side in sides.items()}
    rates = rates_of(sides, workload, repetitions)
    needed = 3 * workload.forward_flops() / 1e12
    row: dict[str, str | int | float] = {
        "model": workload.name,
        "batch": workload.batch_size,
        **{f"{name}_per_s": rate for name, rate in rates.items()},
        **{f"times_{name}": rates["ours"] / rate for name, rate in rates.items() if name != "ours"},
        "share_of_ceiling": rates["ours"] * needed / ceiling,
        "compile_s": sides["ours"].compile_s,
        "largest_loss_difference": _largest_difference(losses["ours"], losses["open_clip_eager"]),
    }
    kept = sorted({0, 1, 4, *range(9, steps, 10), steps - 1})
    curves: list[Columns] = [
        {"model": workload.name, "step": step + 1, **{name: losses[name][step] for name in losses}}
        for step in kept
        if step < steps
    ]
    return row, curves, list(where_the_time_goes(workload, cast(Ours, sides["ours"])))


def rates_of(sides: dict[str, Ours | OpenClip], workload: Workload, repetitions: int) -> dict[str, float]:
    """Pairs a second of each side. A measurement is long enough for the host's start and end not to count."""
    steps = 10 if workload.device == "cuda" else 1

    def run(side: Ours | OpenClip) -> None:
        side.losses(steps)
        synchronize(workload.device)

    timed = {name: seconds(partial(run, side)) for name, side in sides.items()}
    found_s = medians(timed, repetitions)
    return {name: steps * workload.batch_size / taken for name, taken in found_s.items()}


def where_the_time_goes(workload: Workload, ours: Ours) -> Iterator[Columns]:
    """Shares of a step, by what the kernels (on the CPU: the operators) are for."""
    on_gpu = workload.device == "cuda"
    steps = 3
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        ours.losses(steps)
        synchronize(workload.device)
        taken_s = time.perf_counter() - began
    shares = dict.fromkeys((*KINDS, "other kernels"), 0.0)
    for event in profiled.key_averages():
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name)), "other kernels")
        shares[kind] += own_us / 1e6 / taken_s
    shares["nothing runs"] = max(0.0, 1 - sum(shares.values()))
    for kind, share in shares.items():
        yield {"model": workload.name, "part": kind, "share_of_the_step": share}


VARIANTS: Final = {
    "open_clip's modules in our step": Form(trimmed=False, parts=(), compiled=""),
    "texts trimmed": Form(parts=(), compiled=""),
    "and lean attention": Form(parts=("attention",), compiled=""),
    "and patches as a product": Form(parts=("attention", "patches"), compiled=""),
    "and the last block for one token": Form(compiled=""),
    "trimmed, compiled a block at a time": Form(parts=(), compiled="blocks"),
    "trimmed, compiled whole": Form(parts=(), compiled="whole"),
    "lean, compiled a block at a time": Form(compiled="blocks"),
    "lean, compiled whole": Form(compiled="whole"),
    "lean, compiled whole, products tuned": Form(compiled="max-autotune-no-cudagraphs"),
}


def variants(workload: Workload, repetitions: int, tuned: bool) -> Iterator[Columns]:
    """What each part of our side gives, one variant in memory at a time."""
    for name, form in VARIANTS.items():
        if ("tuned" in name and not tuned) or (workload.device != "cuda" and "whole" in name):
            continue
        side = Ours(workload, form)
        rate = rates_of({"ours": side}, workload, repetitions)["ours"]
        yield {
            "model": workload.name,
            "variant": name,
            "per_s": rate,
            "compile_s": side.compile_s,
        }
        del side
        torch._dynamo.reset()
        if workload.device == "cuda":
            torch.cuda.empty_cache()


def _largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--models",
        nargs="+",
        default=[f"{name}:{size}" for name, size in CASES[device]],
        metavar="NAME:BATCH",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS[device], help="of a caption (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="whose losses are compared (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=5 if device == "cuda" else 3)
    parser.add_argument("--variants", action="store_true", help="also what each part of ours gives")
    parser.add_argument(
        "--tuned", action="store_true", help="also torch's search for faster products: minutes"
    )
    arguments = parser.parse_args()
    # Sides take turns in one process: what one gives back must fit the next.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cudnn.benchmark = True  # as open_clip's training script has it
    rows, curves, parts, found = [], [], [], []
    ceiling = ceiling_tflops(device, "bf16" if device == "cuda" else "fp32")
    for case in arguments.models:
        name, _, size = case.partition(":")
        workload = Workload(name, int(size), arguments.tokens, device)
        row, losses, shares = measured(workload, ceiling, arguments.steps, arguments.repetitions)
        rows.append(row)
        curves += losses
        parts += shares
        if arguments.variants or arguments.tuned:
            found += list(variants(workload, arguments.repetitions, arguments.tuned))
        del workload
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
        more = {
            f"Losses over {arguments.steps} steps": curves,
            f"Where a step of ours goes (matmul ceiling {ceiling:.3g} TFLOP/s)": parts,
        }
        if found:
            more["What each part gives"] = found
        # After each model: the next takes minutes, and what is known by then is kept.
        where = gpu(torch.cuda.get_device_name()) if device == "cuda" else cores()
        report("step", rows, device=where, more=more)


if __name__ == "__main__":
    main()
