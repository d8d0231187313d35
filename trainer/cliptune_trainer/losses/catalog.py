"""The losses by name.

A new one is a file beside this one and an entry here. Enters: a name. Leaves: its `LossEntry`. Called by the
spec, which checks names and parameters, and by the objective, which binds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import torch
from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast
from cliptune_trainer.losses.cyclip import cyclip
from cliptune_trainer.losses.decoupled import decoupled
from cliptune_trainer.losses.distillation import distillation
from cliptune_trainer.losses.entry import (
    BIAS,
    LABELS,
    NEGATIVE_CAPTIONS,
    TEACHER,
    LossEntry,
    Parameter,
    Parametrised,
    Tiled,
)
from cliptune_trainer.losses.hard_caption import hard_caption
from cliptune_trainer.losses.hard_negative import hard_negative
from cliptune_trainer.losses.infonce import infonce
from cliptune_trainer.losses.margin import margin
from cliptune_trainer.losses.multi_positive import multi_positive
from cliptune_trainer.losses.robust import robust
from cliptune_trainer.losses.sigmoid import sigmoid
from cliptune_trainer.losses.soft_target import soft_target
from cliptune_trainer.losses.tiled_sigmoid import tiled_sigmoid
from cliptune_trainer.losses.tiled_softmax import tiled_infonce, tiled_multi_positive


def _entry(
    function: Callable[..., Tensor],
    told: str,
    *,
    parameters: dict[str, Parameter] | None = None,
    needs: tuple[str, ...] = (),
    tiled: Tiled | None = None,
    tables: int = 8,
    below_zero: bool = False,
    parts_repeats: bool = False,
    robust: bool = False,
) -> LossEntry:
    return LossEntry(
        function=cast(Parametrised, function),
        told=told,
        parameters=parameters or {},
        needs=frozenset(needs),
        tiled=tiled,
        tables=tables,
        below_zero=below_zero,
        parts_repeats=parts_repeats,
        robust=robust,
    )


def _in_tiles(kernel: Callable[..., Tensor]) -> Tiled:
    """A kernel over features, scale, bias and identities, as a loss over a `Contrast`."""

    def tiled(
        contrast: Contrast, /, *, block: int, products: torch.dtype | None, labels: float = 0.0
    ) -> Tensor:
        return kernel(
            contrast.image_NP,
            contrast.text_NP,
            contrast.logit_scale,
            contrast.logit_bias,
            contrast.identities.by_label() if labels else contrast.identities,
            block=block,
            products=products,
        )

    return cast(Tiled, tiled)


LOSSES: Final[dict[str, LossEntry]] = {
    "infonce": _entry(
        infonce,
        "CLIP: a row's own partner among all",
        tiled=_in_tiles(tiled_infonce),
        tables=6,
        parts_repeats=True,
        robust=True,
    ),
    "sigmoid": _entry(
        sigmoid,
        "SigLIP: every pair by itself",
        needs=(BIAS,),
        tiled=_in_tiles(tiled_sigmoid),
        tables=6,
        parts_repeats=True,
    ),
    "multi_positive": _entry(
        multi_positive,
        "SupCon, UniCL: equal captions, images or labels belong together",
        parameters={"labels": Parameter(default=0.0, low=0.0, high=1.0, needs=LABELS, switch=True)},
        tiled=_in_tiles(tiled_multi_positive),
        tables=7,
    ),
    "soft_target": _entry(
        soft_target,
        "MedCLIP: targets by shared labels",
        parameters={"sharpness": Parameter(default=1.0, low=0.0, high=100.0)},
        needs=(LABELS,),
        tables=7,
    ),
    "hard_negative": _entry(
        hard_negative,
        "HN-NCE: the hardest negatives count for more",
        parameters={
            "alpha": Parameter(default=1.0, low=0.0, high=1.0),
            "beta": Parameter(default=0.25, low=0.0, high=10.0),
        },
        below_zero=True,
        tables=10,
    ),
    "hard_caption": _entry(
        hard_caption,
        "NegCLIP: captions that are nearly right",
        needs=(NEGATIVE_CAPTIONS,),
        tables=12,
        parts_repeats=True,
    ),
    "decoupled": _entry(decoupled, "DCL: no positive in the denominator", below_zero=True, tables=7),
    "cyclip": _entry(
        cyclip,
        "CyCLIP: images and texts have one geometry",
        parameters={
            "in_modal": Parameter(default=0.25, low=0.0, high=100.0),
            "cross_modal": Parameter(default=0.25, low=0.0, high=100.0),
        },
        tables=9,
        parts_repeats=True,
    ),
    "margin": _entry(
        margin,
        "VSE++: ahead of all others by a margin",
        parameters={
            "margin": Parameter(default=0.2, low=1e-6, high=100.0),
            "hardest": Parameter(default=0.0, low=0.0, high=1.0, switch=True),
        },
        tables=7,
    ),
    "distillation": _entry(
        distillation, "CLIP-KD: what the starting model made of the batch", needs=(TEACHER,), tables=11
    ),
}
ROBUST_FORM: Final[LossEntry] = _entry(
    robust,
    "FastCLIP: infonce with a global temperature",
    parameters={"concentration": Parameter(default=0.3, low=0.01, high=0.99)},
    below_zero=True,
    tables=8,
)
"""What "infonce" becomes where `loss.temperature` is "global"."""
