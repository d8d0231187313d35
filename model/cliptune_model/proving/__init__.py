"""Small computations that show whether this machine computes rightly, each compared with the CPU.

Enters: a device. Leaves: `Proof`s by the names that `rules` asks for. Called by `cliptune_model.doctor`; all
together take seconds. What a failed proof leads to is said in `CONSEQUENCES` and done by `rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from cliptune_model.machine.proofs import Proof
from cliptune_model.proving.attending import prove_attention
from cliptune_model.proving.compare import Sizes, sizes_for
from cliptune_model.proving.model import prove_gradients
from cliptune_model.proving.shapes import prove_long_sums, prove_real_shapes, prove_resize
from cliptune_model.proving.training import prove_checkpointing, prove_fused_optimizer, prove_half

__all__ = ["CONSEQUENCES", "PROVERS", "prove_all", "sizes_for"]

PROVERS: Final[dict[str, Callable[[str, Sizes], Proof]]] = {
    "gradients": prove_gradients,
    "real shapes": prove_real_shapes,
    "long sums": prove_long_sums,
    "bf16": prove_half("bf16"),
    "fp16": prove_half("fp16"),
    "fused optimiser": prove_fused_optimizer,
    "checkpointing": prove_checkpointing,
    "resize": prove_resize,
    "sdpa attention": prove_attention("sdpa"),
    "sliced attention": prove_attention("sliced"),
    "chunked attention": prove_attention("chunked"),
}

CONSEQUENCES: Final[Mapping[str, str]] = {
    "gradients": "jobs go to the CPU",
    "real shapes": "jobs go to the CPU",
    "long sums": "micro-batches stay below 32,767 tokens",
    "bf16": "another precision is taken",
    "fp16": "another precision is taken",
    "fused optimiser": "the plain one is taken",
    "checkpointing": "activations are kept, in smaller micro-batches",
    "sdpa attention": "attention is computed in blocks",
    "sliced attention": "another way of attention is taken",
    "chunked attention": "another way of attention is taken",
}


def prove_all(device: str, sizes: Sizes | None = None) -> Iterator[tuple[str, Proof]]:
    """Every proof in turn. What the device cannot do at all is a failed proof, not an exception."""
    for name, prover in PROVERS.items():
        try:
            yield name, prover(device, sizes or sizes_for(device))
        except Exception as error:  # drivers fail with whatever they like; that is what is looked for
            lines = str(error).strip().splitlines() or [""]
            yield name, Proof(holds=False, told=f"{device} fails ({type(error).__name__}: {lines[0][:200]})")
