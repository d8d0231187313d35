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
import os
from collections.abc import Iterator
from functools import partial
from typing import Final

import torch

from bench.record import Columns, cores, gpu, of_other_models, report
from bench.step_shares import ceiling_tflops, shares_of
from bench.step_sides import Form, OpenClip, Ours, Workload
from bench.turns import medians, seconds
from cliptune_model.machine.synchronize import synchronize

CASES: Final = {
    "cuda": [("ViT-B-32", 1024), ("ViT-B-16", 512), ("ViT-L-14", 192)],
    "cpu": [("ViT-B-32", 16)],
}
TOKENS: Final = {"cuda": 24, "cpu": 15}
_PROFILED_STEPS: Final = 3


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
    ours = sides["ours"]
    shares = shares_of(lambda: ours.losses(_PROFILED_STEPS), workload.device)
    parts: list[Columns] = [
        {"model": workload.name, "part": part, "share_of_the_step": share} for part, share in shares.items()
    ]
    return row, curves, parts


def rates_of(sides: dict[str, Ours | OpenClip], workload: Workload, repetitions: int) -> dict[str, float]:
    """Pairs a second of each side. A measurement is long enough for the host's start and end not to count."""
    steps = 10 if workload.device == "cuda" else 1

    def run(side: Ours | OpenClip) -> None:
        side.losses(steps)
        synchronize(workload.device)

    timed = {name: seconds(partial(run, side)) for name, side in sides.items()}
    found_s = medians(timed, repetitions)
    return {name: steps * workload.batch_size / taken for name, taken in found_s.items()}


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
    parser.add_argument(
        "--add", action="store_true", help="keep what is stored of other models on such a device"
    )
    arguments = parser.parse_args()
    # Sides take turns in one process: what one gives back must fit the next.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cudnn.benchmark = True  # as open_clip's training script has it
    rows, curves, parts, found = [], [], [], []
    where = gpu(torch.cuda.get_device_name()) if device == "cuda" else cores()
    names = {case.partition(":")[0] for case in arguments.models}
    before = of_other_models("step", where, names) if arguments.add else {}
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
        titles = dict.fromkeys((*before, *more))
        tables = {title: [*before.get(title, []), *more.get(title, [])] for title in titles if title}
        report("step", [*before.get("", []), *rows], device=where, more=tables)


if __name__ == "__main__":
    main()
