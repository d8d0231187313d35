"""The step of the image towers: the head of Lite0 onto the teacher's space, and the ViT taught by it.

Enters: what `prepare` wrote. Leaves: `images.NAME.pt` for each model. Run by `python -m scripts.mini images`;
minutes on a GPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.mini import augment, towers, trunk
from scripts.mini.head import HeadPlan, Inverted, told, train_head
from scripts.mini.inversion import InversionPlan, invert
from scripts.mini.material import CHUNK, HELD_OUT, features, load, views
from scripts.mini.photos import PhotoFeatures
from scripts.mini.vit import ViTPlan, train_vit, vit_told


def run(
    prepared: Path,
    out: Path,
    device: str,
    head_plan: HeadPlan,
    vit_plan: ViTPlan,
    inversion_plan: InversionPlan,
) -> None:
    """The step: both image towers."""
    out.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began_s:.0f} s: {what}", flush=True)

    material = load(prepared, device)
    tell(f"{len(material.pictures)} pictures loaded")
    seen = views(material, head_plan.views)
    tell(f"{head_plan.views} views")
    images, classes_N = invert(material.classifier, inversion_plan, device)
    inverted = Inverted(
        features_VNF=_inverted_features(material.classifier, images, head_plan.inverted_views),
        classes_N=classes_N,
    )
    tell(f"{len(images)} images inverted")
    photos = PhotoFeatures.of(material.classifier, seen.features_VNF.flatten(0, 1)[::7].float())
    head = train_head(material, seen.features_VNF, photos, inverted, head_plan)
    plain = {split: features(material, material.rows(split), None) for split in HELD_OUT}
    tell(f"{towers.MINI}: {told(material, head, photos, inverted, plain)}")
    _keep(head, out / f"images.{towers.MINI}.pt")
    vit = train_vit(material, seen, head, vit_plan)
    tell(f"{towers.VIT}: {vit_told(material, vit)}")
    _keep(vit, out / f"images.{towers.VIT}.pt")


@torch.inference_mode()
def _inverted_features(classifier: Any, images_NCSS: Tensor, count: int) -> Tensor:
    """[V, N, F], fp16, the first view as drawn."""
    generator = torch.Generator(images_NCSS.device).manual_seed(9)
    seen = []
    for view in range(count):
        parts = []
        for part in torch.split(images_NCSS, CHUNK):
            if view:
                (shown,) = augment.views(part, (trunk.IMAGE_SIZE,), generator)
            else:
                shown = augment.plain(part, trunk.IMAGE_SIZE)
            parts.append(trunk.pooled(classifier, shown).half())
        seen.append(torch.cat(parts))
    return torch.stack(seen).clone()


def _keep(module: nn.Module, path: Path) -> None:
    torch.save({key: value.half().cpu() for key, value in module.state_dict().items()}, path)
