"""The head that takes Lite0's features into the teacher's space; the trunk below stays as ImageNet made it.

Enters: features of pictures, of images that the classifier imagines and of photos that it implies; what all
of these mean. Leaves: the trained head and its figures. Called by `images.py`; a minute on a GPU.

It begins as the classifier's opinion in words: a hidden unit for each class, with the class's row, which
fires when its logit is high and adds the class's vector (ConSE, Norouzi et al. 2014, without its softmax).

Shape suffixes: N pictures, V views, F features, D embedding, M meanings, K classes, B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripts.mini import towers
from scripts.mini.material import Material, held_out
from scripts.mini.photos import PhotoFeatures

_WARM_UP: Final = 100
# A class's unit fires above this logit; its weights are the classifier's by the next, and what it adds.
_FIRES_ABOVE, _ROW_SCALE, _VECTOR_SCALE = 4.0, 0.5, 0.3
_RAISED: Final = 10.0  # nats


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadPlan:
    """The head's training."""

    views: int = 16
    inverted_views: int = 6
    steps: int = 5000
    batch: int = 2048
    """Pictures; as many photo features, and half as many of inverted images."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    averaging: float = 0.998
    """Of weights over steps: what leaves is the average."""
    meaning_temperature: float = 0.05
    """Of the teacher's similarities, which say how alike two meanings are."""
    scale: float = 30.0
    general_share: float = 0.5
    """How often a class goes by a more general name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inverted:
    """Features of images that the classifier imagines: [V, N, F], fp16, the first view as drawn."""

    features_VNF: Tensor
    classes_N: Tensor


def new_head(photos: PhotoFeatures, class_KD: Tensor, dropout: float = 0.0) -> nn.Module:
    """The head as open_clip builds it, beginning as the classifier's opinion in words."""
    tower: Any = towers.build(towers.MINI).visual
    tower.head.mlp.drop1.p = dropout
    head: Any = tower.head.to(class_KD.device)
    classes = len(class_KD)
    with torch.no_grad():
        head.mlp.fc1.weight[:classes] = _ROW_SCALE * photos.weight_KF
        head.mlp.fc1.bias[:classes] = _ROW_SCALE * (photos.bias_K - _FIRES_ABOVE)
        head.mlp.fc2.weight[:, :classes] = _VECTOR_SCALE * class_KD.T
    found: nn.Module = head
    return found


def train_head(
    material: Material, features_VNF: Tensor, photos: PhotoFeatures, inverted: Inverted, plan: HeadPlan
) -> nn.Module:
    """The head, in evaluation mode."""
    device = features_VNF.device
    torch.manual_seed(0)
    known = material.meanings
    head = new_head(photos, known.of_class_KD, plan.dropout).train()
    average = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(plan.averaging))  # type: ignore[no-untyped-call]
    generator = torch.Generator(device).manual_seed(3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    of_train_N4 = known.of_picture_N4[material.train_N]
    views, count = features_VNF.shape[:2]

    def drawn(below: int, size: int) -> Tensor:
        return torch.randint(below, (size,), generator=generator, device=device)

    for step in range(plan.steps):
        warm = min(1.0, (step + 1) / _WARM_UP)
        optimizer.param_groups[0]["lr"] = (
            plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        )
        row_B = drawn(count, plan.batch)
        seen_BF = features_VNF[drawn(views, plan.batch), row_B].float()
        meant_BD = known.all_MD[of_train_N4[row_B, drawn(of_train_N4.shape[1], plan.batch)]]

        photo_BF = photos.draw(seen_BF, generator)
        table_KD = known.class_table(plan.general_share, generator)
        photo_meant_BD = F.normalize(photos.opinion(photo_BF) @ table_KD, dim=-1)

        half = plan.batch // 2
        which_H = drawn(len(inverted.classes_N), half)
        inverted_HF = inverted.features_VNF[drawn(len(inverted.features_VNF), half), which_H].float()
        table_KD = known.class_table(plan.general_share, generator)
        class_HK = F.one_hot(inverted.classes_N[which_H], len(table_KD)).float()
        inverted_meant_HD = F.normalize((photos.opinion(inverted_HF) + class_HK) @ table_KD, dim=-1)

        found = head(torch.cat([seen_BF, photo_BF, inverted_HF]))
        losses = [
            apart(part, meant, known.all_MD, plan)
            for part, meant in zip(
                torch.split(found, [plan.batch, plan.batch, half]),
                (meant_BD, photo_meant_BD, inverted_meant_HD),
                strict=True,
            )
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
        average.update_parameters(head)
    averaged: nn.Module = average.module
    return averaged.eval()


def apart(found_BD: Tensor, meant_BD: Tensor, all_MD: Tensor, plan: HeadPlan) -> Tensor:
    """Cross-entropy against how alike the teacher finds each meaning, and the cosine.

    The same and nearly the same captions are no negatives: they share the target's mass.
    """
    found_BD = F.normalize(found_BD, dim=-1)
    wanted_BM = (meant_BD @ all_MD.T / plan.meaning_temperature).softmax(-1)
    cross = -(wanted_BM * (plan.scale * found_BD @ all_MD.T).log_softmax(-1)).sum(-1).mean()
    return cross + 1 - (found_BD * meant_BD).sum(-1).mean()


@torch.no_grad()
def told(
    material: Material,
    head: nn.Module,
    photos: PhotoFeatures,
    inverted: Inverted,
    plain_by_split: dict[str, Tensor],
) -> str:
    """Held-out figures, and how well classes are named, in a line."""
    parts = []
    for split, features_NF in plain_by_split.items():
        first, fifth = held_out(material, head(features_NF.float()), split)
        parts.append(f"{split} {100 * first:.1f}/{100 * fifth:.1f}")
    class_KD = material.meanings.of_class_KD
    every_K = torch.arange(len(class_KD), device=class_KD.device)
    for what, features_NF, classes_N in (
        ("implied photos", photos.raised(_RAISED), every_K),
        ("inverted images", inverted.features_VNF[0].float(), inverted.classes_N),
    ):
        right = (F.normalize(head(features_NF), dim=-1) @ class_KD.T).argmax(-1) == classes_N
        parts.append(f"{what} {100 * float(right.float().mean()):.1f}")
    return ", ".join(parts)
