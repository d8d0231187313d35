"""Half of a batch in each of two processes. Run as a module it is the second one.

Imports little: a process for it should start quickly.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn

from cliptune_model.similarity import Cosine, Similarity
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.losses.config import LossConfig, Term
from cliptune_trainer.losses.objective import Features, Objective
from tests.trainer.contrasts import towers_of

ROWS = 8
CONFIGS = {
    **{name: LossConfig(terms=(Term(name=name),)) for name in LOSSES},
    "robust": LossConfig(temperature="global"),
}


@dataclass
class Scales:
    """What objectives look at of a model."""

    model: nn.Module
    similarity: Similarity


def scales() -> Scales:
    """The same in every process."""
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
    model.logit_bias = nn.Parameter(torch.tensor(-4.0, dtype=torch.float64))
    return Scales(model, Cosine(32))


def gradients_of(rows: slice) -> dict[str, list[Tensor]]:
    """By objective: the loss, the gradient of the scale, and those of the rows' features."""
    found = {}
    for name, config in CONFIGS.items():
        given, part = scales(), features_of(rows)
        value = Objective(config)(given, part)
        leaves = [part.image_ND, part.text_ND, part.negative_ND]
        gradients = torch.autograd.grad(
            value, [given.model.logit_scale, *leaves], allow_unused=True, materialize_grads=True
        )
        found[name] = [value.detach(), *gradients]
    return found


def features_of(rows: slice) -> Features:
    """These rows of a batch of `ROWS`, as leaves."""
    whole = towers_of(ROWS, torch.float64)
    who, teacher = whole.identities, whole.teacher
    assert whole.negative_ND is not None
    assert whole.negative_ids_N is not None
    assert who.labels_NC is not None
    assert teacher is not None
    image_ND, text_ND, negative_ND = (
        one.detach()[rows].clone().requires_grad_()
        for one in (whole.image_ND, whole.text_ND, whole.negative_ND)
    )
    return Features(
        image_ND=image_ND,
        text_ND=text_ND,
        negative_ND=negative_ND,
        negative_ids_N=whole.negative_ids_N[rows],
        identities=replace(
            who,
            image_ids_N=who.image_ids_N[rows],
            caption_ids_N=who.caption_ids_N[rows],
            labels_NC=who.labels_NC[rows],
        ),
        teacher=replace(teacher, image_ND=teacher.image_ND[rows], text_ND=teacher.text_ND[rows]),
    )


def gradients_of_rank(rank: int, meeting: str) -> dict[str, list[Tensor]]:
    """`gradients_of` this rank's half, gathered with the other's."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        half = ROWS // 2
        return gradients_of(slice(rank * half, (rank + 1) * half))
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.save(gradients_of_rank(1, sys.argv[1]), sys.argv[2])
