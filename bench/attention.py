"""Memory of a training step by attention: torch's math kernel beside ours in slices and in chunks.

ViT-L/14 at 336 pixels in fp16: what one more pair costs. Then one pair of 1,022 pixels (5,330 tokens) with
activations recomputed: what the whole step takes, weights and AdamW's state included. Both are counted on
fake tensors, as a GPU under autocast would hold them, and measured as well where there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

import torch

from bench.attention_bytes import Case, pair_bytes, step_bytes
from bench.record import Columns, cores, gpu, report
from cliptune_model.attention import AttentionPlan

MIB: Final = 1 << 20
PLANS: Final = (
    AttentionPlan(mode="sdpa", budget_bytes=1),
    AttentionPlan(mode="sliced", budget_bytes=64 * MIB),
    AttentionPlan(mode="chunked", budget_bytes=64 * MIB),
)
LONG_PLANS: Final = (
    AttentionPlan(mode="sdpa", budget_bytes=1),
    AttentionPlan(mode="chunked", budget_bytes=256 * MIB),
)
PAIRS: Final = 4


def pairs_of_336_pixels(on_gpu: bool) -> Iterator[Columns]:
    """A line for each plan; shares are of torch's math attention."""
    math: dict[str, float] = {}
    for plan in PLANS:
        case = Case(architecture="ViT-L-14-336", attention=plan)
        found = {"counted": pair_bytes(case, pairs=PAIRS) / MIB}
        if on_gpu:
            found["measured"] = pair_bytes(case, pairs=PAIRS, device="cuda") / MIB
        math = math or found
        yield {
            "attention": _name(plan),
            **{f"{how}_mib_a_pair": mib for how, mib in found.items()},
            **{f"{how}_share": mib / math[how] for how, mib in found.items()},
        }


def a_pair_of_1022_pixels(on_gpu: bool) -> Iterator[Columns]:
    """A line for each plan."""
    for plan in LONG_PLANS:
        case = Case(architecture="ViT-L-14", attention=plan, checkpointing=True, image_size=1022)
        found = {"counted": step_bytes(case, pairs=1) / 2**30}
        if on_gpu:
            found["measured"] = step_bytes(case, pairs=1, device="cuda") / 2**30
        yield {"attention": _name(plan), **{f"{how}_gib": gib for how, gib in found.items()}}


def _name(plan: AttentionPlan) -> str:
    return "math" if plan.mode == "sdpa" else f"{plan.mode}, blocks of {plan.budget_bytes // MIB} MiB"


def main() -> None:
    """Entry point."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    on_gpu = torch.cuda.is_available()
    report(
        "attention",
        pairs_of_336_pixels(on_gpu),
        device=gpu(torch.cuda.get_device_name()) if on_gpu else cores(),
        more={"One pair of 1,022 pixels, the whole step": a_pair_of_1022_pixels(on_gpu)},
    )


if __name__ == "__main__":
    main()
