"""Images that Lite0 takes for photos, made from the classifier alone: objects cut out on white.

Enters: the classifier and classes. Leaves: images in 0 … 1 whose features are the network's own. Called by
the image steps. An image is drawn until the classifier is sure of its class and every batch norm sees the
mean and the deviation that ImageNet's photos gave it (Yin et al. 2020, DeepInversion, equations 2 to 4),
inside of a soft blob with white around it, as cut-out photos are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.mini import trunk

# Size and step of the two halves: the coarse first, then the fine.
_HALVES: Final = ((trunk.IMAGE_SIZE // 2, 0.08), (trunk.IMAGE_SIZE, 0.04))
_SHIFT: Final = 0.1  # of the side, at random: details must not depend on where pixels fall
_WAVES: Final = 5
_EPSILON: Final = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionPlan:
    """How long, and what counts.

    Attributes:
        images: in all; classes come in turn, in an order of chance.
        batch: at once, on which the statistics are taken.
        steps: of each of the two halves.
        statistics_weight: of batch norms' distance from what they learned.
        smoothness_weight: of total variation.
    """

    images: int = 500
    batch: int = 500
    steps: int = 60
    statistics_weight: float = 3.0
    smoothness_weight: float = 0.3


class _Statistics:
    """How far what a batch norm is given is from what it learned, squared and in deviations."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self.hook = norm.register_forward_pre_hook(self._meet)
        self.distance = torch.zeros(())

    def _meet(self, norm: Any, given: tuple[Tensor, ...]) -> None:
        given_BCHW = given[0].float()
        mean_C = given_BCHW.mean((0, 2, 3))
        deviation_C = given_BCHW.var((0, 2, 3), unbiased=False).clamp(min=1e-6).sqrt()
        scale_C = norm.running_var + _EPSILON
        self.distance = ((mean_C - norm.running_mean) ** 2 / scale_C).mean() + (
            (deviation_C - norm.running_var.clamp(min=1e-6).sqrt()) ** 2 / scale_C
        ).mean()


def invert(classifier: Any, plan: InversionPlan, device: str) -> tuple[Tensor, Tensor]:
    """→ (images [N, 3, S, S] in 0 … 1, their classes [N])."""
    generator = torch.Generator(device).manual_seed(11)
    order = torch.randperm(trunk.CLASSES, generator=generator, device=device)
    classes_N = order.repeat(-(-plan.images // trunk.CLASSES))[: plan.images]
    made = [_draw(classifier, chunk, plan, generator) for chunk in torch.split(classes_N, plan.batch)]
    return torch.cat(made), classes_N


def _draw(classifier: Any, classes_B: Tensor, plan: InversionPlan, generator: torch.Generator) -> Tensor:
    met = [_Statistics(module) for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    blobs = _blobs(len(classes_B), trunk.IMAGE_SIZE, generator)
    drawn = 0.3 * torch.randn(
        len(classes_B), 3, _HALVES[0][0], _HALVES[0][0], generator=generator, device=classes_B.device
    )
    for size, rate in _HALVES:
        drawn = F.interpolate(drawn.detach(), size=(size, size), mode="bilinear", align_corners=False)
        drawn = drawn.contiguous(memory_format=torch.channels_last).requires_grad_(True)
        inside = F.interpolate(blobs, size=(size, size), mode="bilinear", align_corners=False)
        optimizer = torch.optim.Adam([drawn], lr=rate, betas=(0.5, 0.9))
        reach = int(size * _SHIFT)
        for step in range(plan.steps):
            images = torch.tanh(drawn) * inside + 1 - inside
            if step % 2:
                images = images.flip(3)
            shift = torch.randint(-reach, reach + 1, (2,), generator=generator, device=classes_B.device)
            images = torch.roll(images, tuple(shift.tolist()), (2, 3))
            with torch.autocast(
                classes_B.device.type, torch.bfloat16, enabled=classes_B.device.type == "cuda"
            ):
                logits = classifier(images)
            loss = F.cross_entropy(logits.float(), classes_B)
            loss = loss + plan.statistics_weight * torch.stack([one.distance for one in met]).mean()
            loss = loss + plan.smoothness_weight * _variation(images)
            optimizer.zero_grad(set_to_none=True)
            # Of each image its own: Adam's steps would not notice, but small gradients lose digits.
            torch.autograd.backward(loss * len(classes_B))
            optimizer.step()
    for one in met:
        one.hook.remove()
    return ((torch.tanh(drawn.detach()) * inside + 1 - inside) + 1) / 2


def _variation(images: Tensor) -> Tensor:
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    return across + (images[:, :, 1:] - images[:, :, :-1]).abs().mean()


def _blobs(count: int, size: int, generator: torch.Generator) -> Tensor:
    """[count, 1, size, size]: 1 inside of a round outline with waves, 0 outside, soft between."""
    device = generator.device
    line = torch.linspace(-1, 1, size, device=device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle, radius = torch.atan2(y, x)[None], torch.sqrt(x**2 + y**2)[None]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=generator, device=device) * (high - low) + low

    outline = torch.ones(count, size, size, device=device)
    for wave in range(1, _WAVES + 1):
        outline = outline + uniform(-0.18, 0.18) * torch.cos(wave * angle + uniform(0, 6.28))
    return torch.sigmoid((uniform(0.55, 0.95) * outline - radius) * size / 6)[:, None]
