"""Batches as losses see them, small and random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune_trainer.losses import Contrast, Identities, Teacher
from cliptune_trainer.losses.objective import Features

DIM = 16


def features(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors of pairs that belong together a little, as leaves."""
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    image, noise = (torch.randn(rows, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    units = F.normalize(image, dim=-1), F.normalize(image + 2 * noise, dim=-1)
    image_ND, text_ND = (unit.to(dtype).requires_grad_() for unit in units)
    return image_ND, text_ND


def identities(
    images: Sequence[int], captions: Sequence[int], labels: Sequence[Sequence[int]] | None = None
) -> Identities:
    """Rows of these ids; `labels` multi-hot."""
    return Identities(
        image_ids_N=torch.tensor(images),
        caption_ids_N=torch.tensor(captions),
        labels_NC=None if labels is None else torch.tensor(labels, dtype=torch.float32),
    )


def alone(rows: int) -> Identities:
    """Every row its own image and its own caption."""
    return identities(range(rows), range(rows))


def contrast(
    rows: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 20.0,
    who: Identities | None = None,
    full: bool = False,
) -> Contrast:
    """A batch; with `full`, all that any loss may need."""
    image_ND, text_ND = features(rows, dtype)
    extra: dict[str, object] = {}
    if full:
        who = who or identities(
            [0, 0, *range(1, rows - 1)],
            [*range(rows - 1), 2],
            [[row % 3 == 0, row % 2 == 0] for row in range(rows)],
        )
        other_image_ND, other_text_ND = features(rows, dtype, seed=1)
        extra = {
            "logit_bias": torch.tensor(-6.0, dtype=dtype, requires_grad=True),
            "negative_text_MP": features(rows, dtype, seed=2)[1],
            "negative_ids_M": torch.tensor([-1, 3, -2, *[-1] * (rows - 3)]),
            "teacher": Teacher(
                image_ND=other_image_ND.detach(),
                text_ND=other_text_ND.detach(),
                logit_scale=torch.tensor(15.0, dtype=dtype),
            ),
        }
    return Contrast(
        image_NP=image_ND,
        text_NP=text_ND,
        logit_scale=torch.tensor(scale, dtype=dtype, requires_grad=True),
        identities=who or alone(rows),
        **extra,  # type: ignore[arg-type]
    )


def leaves(given: Contrast) -> list[Tensor]:
    """What a loss may have gradients in."""
    found = [given.image_NP, given.text_NP, given.logit_scale, given.logit_bias, given.negative_text_MP]
    return [one for one in found if one is not None]


def towers_of(rows: int, dtype: torch.dtype = torch.float32) -> Features:
    """Features as towers leave them, 32 numbers of any size, with all that any loss may need."""
    given = contrast(rows, dtype, full=True)
    generator = torch.Generator().manual_seed(rows)
    image_ND, text_ND, negative_ND = (
        torch.randn(rows, 32, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(3)
    )
    return Features(
        image_ND=image_ND,
        text_ND=text_ND,
        identities=given.identities,
        negative_ND=negative_ND,
        negative_ids_N=given.negative_ids_M,
        teacher=given.teacher,
    )
