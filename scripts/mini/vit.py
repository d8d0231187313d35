"""A small ViT taught by the first model: its vectors of the same views, and of blends of two.

Enters: views and the trained head. Leaves: the trained ViT and its figures. Called by `images.py`; minutes on
a GPU. Hinton et al. 2015 (distillation), Zhang et al. 2018 (mixup, of images and of vectors).

Shape suffixes: N pictures, V views, D embedding, B batch, S side.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.mini import augment, towers
from scripts.mini.head import HeadPlan, apart
from scripts.mini.material import CHUNK, HELD_OUT, Material, Views, held_out
from scripts.mini.texts import decayed, distance


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTPlan:
    """The ViT's training: from random weights."""

    seconds: float = 120.0
    batch: int = 2048
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    caption_weight: float = 0.3
    head: HeadPlan = field(default_factory=HeadPlan)
    """How captions are compared."""


def train_vit(material: Material, seen: Views, head: nn.Module, plan: ViTPlan) -> nn.Module:
    """The ViT whose vectors are the first model's, of the same views and of blends of two; captions help."""
    device = seen.features_VNF.device
    torch.manual_seed(0)
    vit: Any = towers.build(towers.VIT).visual
    vit = vit.to(device).train()
    with torch.no_grad():
        wanted_VND = torch.stack([F.normalize(head(part.float()), dim=-1) for part in seen.features_VNF])
    optimizer = torch.optim.AdamW(
        decayed(list(vit.parameters())),
        lr=plan.learning_rate,
        weight_decay=plan.weight_decay,
    )
    generator = torch.Generator(device).manual_seed(4)
    known = material.meanings
    of_train_N4 = known.of_picture_N4[material.train_N]
    count, pictures_count = seen.features_VNF.shape[:2]
    began_s, steps = time.monotonic(), 0
    while (done := (time.monotonic() - began_s) / plan.seconds) < 1:
        warm = min(1.0, (steps + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * warm * max(0.5 * (1 + math.cos(math.pi * done)), 1e-3)

        def drawn(below: int) -> Tensor:
            return torch.randint(below, (plan.batch,), generator=generator, device=device)

        view_B, row_B, pick_B = drawn(count), drawn(pictures_count), drawn(of_train_N4.shape[1])
        images_BCSS = seen.small_VNCSS[view_B, row_B].float() / 127.5 - 1
        wanted_BD = wanted_VND[view_B, row_B]
        meant_BD = known.all_MD[of_train_N4[row_B, pick_B]]
        # Half of the batch is blended with the other half, vectors too (Zhang et al. 2018, mixup).
        half = plan.batch // 2
        share = torch.rand(half, 1, generator=generator, device=device) * 0.5
        images_BCSS[:half] = torch.lerp(images_BCSS[:half], images_BCSS[half:], share[:, :, None, None])
        wanted_BD[:half] = F.normalize(torch.lerp(wanted_BD[:half], wanted_BD[half:], share), dim=-1)
        with torch.autocast(device.type, torch.bfloat16):
            found = vit(images_BCSS)
        found_BD = F.normalize(found.float(), dim=-1)
        loss = distance(found_BD, wanted_BD)
        if plan.caption_weight:
            loss = loss + plan.caption_weight * apart(
                found_BD[half:], meant_BD[half:], known.all_MD, plan.head
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        steps += 1
    print(f"ViT: {steps} steps, loss {loss.item():.3f}", flush=True)
    trained: nn.Module = vit.eval()
    return trained


@torch.no_grad()
def vit_told(material: Material, vit: nn.Module) -> str:
    """Held-out figures of the ViT in a line."""
    size = int(towers.MODEL_CONFIG[towers.VIT]["vision_cfg"]["image_size"])
    parts = []
    for split in HELD_OUT:
        found = [
            vit(augment.plain(material.batch(rows), size))
            for rows in torch.split(material.rows(split), CHUNK)
        ]
        first, fifth = held_out(material, torch.cat(found), split)
        parts.append(f"{split} {100 * first:.1f}/{100 * fifth:.1f}")
    return ", ".join(parts)
