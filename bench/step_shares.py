"""What a step's time goes to, and what the device could do in it.

Enters: something that takes steps. Leaves: shares of its time by what the kernels are for, and the rate of
one large matrix product. Called by `bench.step`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

from bench.turns import seconds
from cliptune_model.machine.synchronize import synchronize

# What a kernel or an operator is for, by its name; the first that matches.
KINDS: Final = {
    "optimizer": r"adam|multi_tensor|foreach",
    "attention": r"flash|fmha|scaled_dot|attention|softmax",
    "products": r"gemm|nvjet|cutlass|sm90_|sm80_|addmm|aten::mm|bmm|mkldnn|conv",
    "fused passes": r"triton|cpp_fused|graph_",
    "copies and casts": r"copy|memcpy|memset|cat|fill",
}


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


def shares_of(steps: Callable[[], object], device: str) -> dict[str, float]:
    """Shares of the time that `steps` takes, by what the kernels (on the CPU: the operators) are for."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        steps()
        synchronize(device)
        taken_s = time.perf_counter() - began
    shares = dict.fromkeys((*KINDS, "other kernels"), 0.0)
    for event in profiled.key_averages():
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name)), "other kernels")
        shares[kind] += own_us / 1e6 / taken_s
    shares["nothing runs"] = max(0.0, 1 - sum(shares.values()))
    return shares
