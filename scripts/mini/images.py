"""Image towers: the head that takes Lite0's features into the teacher's space, and a ViT taught by it.

Enters: pictures, the lexicon, the teacher and Lite0's weights, from `prepare`. Leaves: `images.NAME.pt` for
each model. Run by `python -m scripts.mini images`; minutes on a GPU. The trunk stays as ImageNet made it.

Shape suffixes: N pictures, V views, F features, D embedding, M meanings, B batch.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.mini import augment, meanings, pictures, towers, trunk
from scripts.mini.meanings import Meanings
from scripts.mini.photos import PhotoFeatures
from scripts.mini.pictures import Picture
from scripts.mini.sentences import Lexicon
from scripts.mini.teacher import Teacher
from scripts.mini.texts import decayed, distance

_CHUNK: Final = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadPlan:
    """The head's training."""

    views: int = 16
    steps: int = 6000
    batch: int = 2048
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    meaning_temperature: float = 0.05
    """Of the teacher's similarities, which say how alike two meanings are."""
    scale: float = 30.0
    photo_weight: float = 1.0


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """Random views of the training pictures: V × N of them, the first view as they are.

    Attributes:
        features_VNF: fp16, Lite0's.
        small_VNCSS: uint8, the same views at the ViT's size.
    """

    features_VNF: Tensor
    small_VNCSS: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """All that the steps share, on the device."""

    pictures: list[Picture]
    images_NCSS: Tensor
    """uint8."""
    meanings: Meanings
    classifier: Any
    train_N: Tensor
    """Rows of the pictures to train on."""

    def rows(self, split: str) -> Tensor:
        """Of a split."""
        chosen = [row for row, picture in enumerate(self.pictures) if picture.split == split]
        return torch.tensor(chosen, device=self.images_NCSS.device)

    def batch(self, rows_B: Tensor) -> Tensor:
        """Those pictures in 0 … 1."""
        return self.images_NCSS[rows_B].float() / 255


def load(prepared: Path, device: str) -> Material:
    """Read what `prepare` wrote."""
    found = pictures.read(prepared / "pictures.zip")
    with ThreadPoolExecutor() as threads:
        images_NSSC = np.stack(list(threads.map(lambda picture: np.asarray(picture.image), found)))
    images = torch.from_numpy(images_NSSC).permute(0, 3, 1, 2)
    teacher = Teacher(prepared / "teacher", device)
    mean_D = torch.from_numpy(np.load(prepared / "mean.npy")).to(device)
    lexicon = Lexicon.read(prepared / "lexicon.json.gz")
    train = [row for row, picture in enumerate(found) if picture.split == "train"]
    return Material(
        pictures=found,
        images_NCSS=images.to(device),
        meanings=meanings.collect(found, lexicon, teacher, mean_D),
        classifier=trunk.build(prepared / "lite0.pt").to(device).requires_grad_(False),
        train_N=torch.tensor(train, device=device),
    )


@torch.inference_mode()
def features(material: Material, rows_N: Tensor, generator: torch.Generator | None) -> Tensor:
    """Lite0's pooled features [N, F]; of a random view each; without a generator of the plain ones."""
    found = []
    for rows_B in torch.split(rows_N, _CHUNK):
        images = material.batch(rows_B)
        if generator is None:
            seen = augment.plain(images, trunk.IMAGE_SIZE)
        else:
            (seen,) = augment.views(images, (trunk.IMAGE_SIZE,), generator)
        found.append(trunk.pooled(material.classifier, seen))
    return torch.cat(found).clone()


@torch.inference_mode()
def views(material: Material, count: int) -> Views:
    """`count` views of every training picture."""
    device = material.images_NCSS.device
    generator = torch.Generator(device).manual_seed(0)
    sizes = (trunk.IMAGE_SIZE, int(towers.MODEL_CONFIG[towers.VIT]["vision_cfg"]["image_size"]))
    seen_VNF, small_VNCSS = [], []
    for view in range(count):
        seen, small = [], []
        for rows_B in torch.split(material.train_N, _CHUNK):
            images = material.batch(rows_B)
            if view:
                large, little = augment.views(images, sizes, generator)
            else:
                large, little = (augment.plain(images, size) for size in sizes)
            seen.append(trunk.pooled(material.classifier, large).half())
            small.append(((little * 0.5 + 0.5) * 255).round().to(torch.uint8))
        seen_VNF.append(torch.cat(seen))
        small_VNCSS.append(torch.cat(small))
    return Views(features_VNF=torch.stack(seen_VNF).clone(), small_VNCSS=torch.stack(small_VNCSS).clone())


def new_head(dropout: float = 0.0) -> nn.Module:
    """The head as open_clip builds it for this configuration."""
    tower: Any = towers.build(towers.MINI).visual
    tower.head.mlp.drop1.p = dropout
    head: nn.Module = tower.head
    return head


def train_head(
    material: Material, features_VNF: Tensor, photo_features: PhotoFeatures, plan: HeadPlan
) -> nn.Module:
    """The head, in evaluation mode."""
    device = features_VNF.device
    torch.manual_seed(0)
    head = new_head(plan.dropout).to(device).train()
    generator = torch.Generator(device).manual_seed(3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    known = material.meanings
    of_train_N4 = known.of_picture_N4[material.train_N]
    views, count = features_VNF.shape[:2]
    for step in range(plan.steps):
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = (
            plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        )
        rows_B = torch.randint(count, (plan.batch,), generator=generator, device=device)
        view_B = torch.randint(views, (plan.batch,), generator=generator, device=device)
        pick_B = torch.randint(of_train_N4.shape[1], (plan.batch,), generator=generator, device=device)
        seen_BF = features_VNF[view_B, rows_B].float()
        meant_BD = known.all_MD[of_train_N4[rows_B, pick_B]]
        photo_BF, photo_meant_BD = photo_features.draw(seen_BF, generator)
        found = head(torch.cat([seen_BF, photo_BF]))
        loss = apart(found[: plan.batch], meant_BD, known.all_MD, plan)
        if plan.photo_weight:
            loss = loss + plan.photo_weight * apart(
                found[plan.batch :], F.normalize(photo_meant_BD, dim=-1), known.all_MD, plan
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    return head.eval()


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


def apart(found_BD: Tensor, meant_BD: Tensor, all_MD: Tensor, plan: HeadPlan) -> Tensor:
    """Cross-entropy against how alike the teacher finds each meaning, and the cosine.

    The same and nearly the same captions are no negatives: they share the target's mass.
    """
    found_BD = F.normalize(found_BD, dim=-1)
    wanted_BM = (meant_BD @ all_MD.T / plan.meaning_temperature).softmax(-1)
    cross = -(wanted_BM * (plan.scale * found_BD @ all_MD.T).log_softmax(-1)).sum(-1).mean()
    return cross + 1 - (found_BD * meant_BD).sum(-1).mean()


@torch.no_grad()
def held_out(material: Material, vectors_ND: Tensor, split: str) -> tuple[float, float]:
    """Recall at 1 and 5 of a split's pictures among its first captions, by the teacher's vectors."""
    first_N = material.meanings.of_picture_N4[material.rows(split), 0]
    distinct_M, right_N = torch.unique(first_N, return_inverse=True)
    scores_NM = F.normalize(vectors_ND, dim=-1) @ material.meanings.all_MD[distinct_M].T
    right_score = scores_NM.gather(1, right_N[:, None])
    rank_N = (scores_NM > right_score).sum(-1)
    return float((rank_N < 1).float().mean()), float((rank_N < 5).float().mean())


@torch.no_grad()
def told(
    material: Material, head: nn.Module, photo_features: PhotoFeatures, plain_by_split: dict[str, Tensor]
) -> str:
    """Held-out figures in a line."""
    parts = []
    for split, features_NF in plain_by_split.items():
        first, fifth = held_out(material, head(features_NF.float()), split)
        parts.append(f"{split} {100 * first:.1f}/{100 * fifth:.1f}")
    class_KD = photo_features.class_KD
    raised_KF = (photo_features.photo_mean_F + 10 * photo_features.towards_KF).clamp(min=0)
    found_KD = F.normalize(head(raised_KF), dim=-1)
    right = (found_KD @ class_KD.T).argmax(-1) == torch.arange(len(class_KD), device=class_KD.device)
    parts.append(f"photo classes {100 * float(right.float().mean()):.1f}")
    return ", ".join(parts)


@torch.no_grad()
def vit_told(material: Material, vit: nn.Module) -> str:
    """Held-out figures of the ViT in a line."""
    size = int(towers.MODEL_CONFIG[towers.VIT]["vision_cfg"]["image_size"])
    parts = []
    for split in ("val", "icons"):
        found = [
            vit(augment.plain(material.batch(rows), size))
            for rows in torch.split(material.rows(split), _CHUNK)
        ]
        first, fifth = held_out(material, torch.cat(found), split)
        parts.append(f"{split} {100 * first:.1f}/{100 * fifth:.1f}")
    return ", ".join(parts)


def run(prepared: Path, out: Path, device: str, head_plan: HeadPlan, vit_plan: ViTPlan) -> None:
    """The step: both image towers."""
    out.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    material = load(prepared, device)
    print(f"loaded after {time.monotonic() - began_s:.0f} s", flush=True)
    seen = views(material, head_plan.views)
    print(f"{head_plan.views} views after {time.monotonic() - began_s:.0f} s", flush=True)
    some_NF = seen.features_VNF.flatten(0, 1)[::7].float()
    photo_features = PhotoFeatures.of(material.classifier, some_NF, material.meanings.of_class_KD)
    head = train_head(material, seen.features_VNF, photo_features, head_plan)
    plain = {split: features(material, material.rows(split), None) for split in ("val", "icons")}
    print(f"{towers.MINI}: {told(material, head, photo_features, plain)}", flush=True)
    _keep(head, out / f"images.{towers.MINI}.pt")
    vit = train_vit(material, seen, head, vit_plan)
    print(f"{towers.VIT}: {vit_told(material, vit)}", flush=True)
    _keep(vit, out / f"images.{towers.VIT}.pt")


def _keep(module: nn.Module, path: Path) -> None:
    torch.save({key: value.half().cpu() for key, value in module.state_dict().items()}, path)
