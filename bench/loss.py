"""The contrastive loss in tiles beside open_clip's own: time and memory of forward and backward, by batch.

Features of unit length with 512 numbers, bf16 on a GPU and fp32 on the CPU, as leaves, so that nothing but
the loss is measured. open_clip computes logits and cross-entropy in the features' format; ours keeps all but
the products in fp32. GiB are the most that was allocated at once beside the features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from bench.record import Columns, cores, gpu, report
from bench.turns import medians, seconds
from cliptune_model.machine.synchronize import synchronize
from cliptune_trainer.losses import Contrast, Identities, choose_tiling, loss_for
from cliptune_trainer.memory.count import LiveBytes

DIM = 512
SCALE, BIAS = 100.0, -10.0
# Beyond this open_clip's table takes more than a GPU has: half a TiB at 262,144.
LARGEST_DENSE = 65_536
SIZES = {"cuda": [4096, 8192, 16_384, 32_768, 65_536, 262_144], "cpu": [512, 1024, 2048]}


class Case:
    """Both sides of one loss over one batch; calling `ours` or `dense` computes loss and gradients once."""

    def __init__(self, name: str, n: int, device: str) -> None:
        self.n, self.device = n, device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        image_ND, noise_ND = (torch.randn(n, DIM, generator=generator, device=device) for _ in range(2))
        # Similarities as of a model in training: 0.3 for pairs, noise for the others.
        text_ND = F.normalize(0.3 * image_ND + 0.95 * noise_ND, dim=-1)
        self.leaves = [
            one.to(kind).requires_grad_()
            for one, kind in (
                (F.normalize(image_ND, dim=-1), dtype),
                (text_ND, dtype),
                (torch.tensor(SCALE, device=device), torch.float32),
                (torch.tensor(BIAS, device=device), torch.float32),
            )
        ]
        places_N = torch.arange(n, device=device)
        self._identities = Identities(image_ids_N=places_N, caption_ids_N=places_N)
        tiling = choose_tiling(name, "on", n, DIM, device)
        self._ours = loss_for(name, tiled=True, block=int(tiling.value))
        self._theirs = ClipLoss() if name == "infonce" else SigLipLoss()
        self._given = 3 if name == "infonce" else 4

    def ours(self) -> None:
        """In tiles."""
        image_ND, text_ND, scale, bias = self.leaves
        contrast = Contrast(
            image_NP=image_ND,
            text_NP=text_ND,
            logit_scale=scale,
            logit_bias=bias,
            identities=self._identities,
        )
        self._finish(self._ours(contrast))

    def dense(self) -> None:
        """open_clip's, the whole table at once."""
        self._finish(self._theirs(*self.leaves[: self._given]))

    def _finish(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for leaf in self.leaves:
            leaf.grad = None
        synchronize(self.device)

    def peak_gib(self, side: Callable[[], None]) -> float:
        """Beside the features."""
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            side()
            return int(torch.cuda.max_memory_allocated() - before) / 2**30
        with LiveBytes(self.device) as live:
            side()
        return int(live.peak) / 2**30


def measured(name: str, n: int, device: str, repetitions: int) -> Columns:
    """One line of the table. The first call, which compiles, is not counted."""
    case = Case(name, n, device)
    sides = {"ours": case.ours}
    if n <= LARGEST_DENSE:
        sides["dense"] = case.dense
    found_s = medians({side: seconds(do) for side, do in sides.items()}, repetitions, warm=2)
    found_gib = {side: case.peak_gib(do) for side, do in sides.items()}
    if "dense" not in sides:
        nothing = "does not fit"
        return {
            "n": n,
            "ours_ms": 1e3 * found_s["ours"],
            "dense_ms": nothing,
            "times_faster": nothing,
            "ours_gib": found_gib["ours"],
            "dense_gib": nothing,
            "times_smaller": nothing,
        }
    return {
        "n": n,
        "ours_ms": 1e3 * found_s["ours"],
        "dense_ms": 1e3 * found_s["dense"],
        "times_faster": found_s["dense"] / found_s["ours"],
        "ours_gib": found_gib["ours"],
        "dense_gib": found_gib["dense"],
        "times_smaller": found_gib["dense"] / found_gib["ours"],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES[device], help="pairs of a batch")
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    rows = {
        name: [measured(name, n, device, arguments.repetitions) for n in arguments.sizes]
        for name in ("infonce", "sigmoid")
    }
    report(
        "loss",
        rows["infonce"],
        device=gpu(torch.cuda.get_device_name()) if device == "cuda" else cores(),
        more={"The sigmoid loss": rows["sigmoid"]},
    )


if __name__ == "__main__":
    main()
