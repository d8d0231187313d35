"""What the image steps share: pictures on the device, what they mean, and views of them.

Enters: what `prepare` wrote. Leaves: `Material`, `Views`,
features, and how well vectors name the pictures that are held out. Called by the image steps.

Shape suffixes: N pictures, V views, F features, D embedding, M meanings, B batch.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.mini import augment, general, meanings, pictures, towers, trunk
from scripts.mini.meanings import Meanings
from scripts.mini.pictures import Picture
from scripts.mini.teacher import Teacher

CHUNK: Final = 256
HELD_OUT: Final = ("val", "icons")


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
    words = json.loads((prepared / "words.json").read_text(encoding="utf-8"))
    names = general.read(prepared / "general.json")
    train = [row for row, picture in enumerate(found) if picture.split == "train"]
    return Material(
        pictures=found,
        images_NCSS=images.to(device),
        meanings=meanings.collect(found, words, names, teacher, mean_D),
        classifier=trunk.build(prepared / "lite0.pt").to(device).requires_grad_(False),
        train_N=torch.tensor(train, device=device),
    )


@torch.inference_mode()
def features(material: Material, rows_N: Tensor, generator: torch.Generator | None) -> Tensor:
    """Lite0's pooled features [N, F]; of a random view each; without a generator of the plain ones."""
    found = []
    for rows_B in torch.split(rows_N, CHUNK):
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
        for rows_B in torch.split(material.train_N, CHUNK):
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


@torch.no_grad()
def held_out(material: Material, vectors_ND: Tensor, split: str) -> tuple[float, float]:
    """Recall at 1 and 5 of a split's pictures among its first captions, by the teacher's vectors."""
    first_N = material.meanings.of_picture_N4[material.rows(split), 0]
    distinct_M, right_N = torch.unique(first_N, return_inverse=True)
    scores_NM = F.normalize(vectors_ND, dim=-1) @ material.meanings.all_MD[distinct_M].T
    right_score = scores_NM.gather(1, right_N[:, None])
    rank_N = (scores_NM > right_score).sum(-1)
    return float((rank_N < 1).float().mean()), float((rank_N < 5).float().mean())
