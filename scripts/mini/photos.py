"""Photo-like features without a photo: what Lite0's classifier implies, for the head above it.

Enters: the classifier and the pooled features of real pictures. Leaves: features and the classifier's opinion
of any. Called by the image steps. The features are drawn around the mean feature of ImageNet's photos,
which follows from the last batch norm (its output is normal, with the mean and the spread that it learned;
ReLU6 and pooling come after), and are moved towards classes in the directions in which features vary (the
class means of a linear discriminant with the classifier's rows as weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

_DRAWS: Final = 20_000
# How far the wanted class's logit is raised, in nats; photos of a known class lie in this range.
_RAISED: Final = (5.0, 16.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoFeatures:
    """A source of features. K classes, F features, D embedding."""

    weight_KF: Tensor
    bias_K: Tensor
    photo_mean_F: Tensor
    towards_KF: Tensor
    """Raises a class's logit by 1."""
    spread_FF: Tensor
    """Times a standard normal: how pictures vary."""

    @classmethod
    def of(cls, classifier: Any, features_NF: Tensor) -> PhotoFeatures:
        """`features_NF`: of real pictures, for their covariance alone."""
        weight_KF, bias_K = (tensor.detach().float() for tensor in classifier.classifier.parameters())
        norm = classifier.bn2
        draws = torch.randn(_DRAWS, 1, device=weight_KF.device, generator=_seeded(weight_KF.device))
        photo_mean_F = (norm.bias.float() + norm.weight.float().abs() * draws).clamp(0, 6).mean(0).detach()
        centred_NF = features_NF.float() - features_NF.float().mean(0)
        covariance_FF = centred_NF.T @ centred_NF / len(centred_NF)
        towards_KF = (weight_KF - weight_KF.mean(0)) @ covariance_FF
        towards_KF = towards_KF / (towards_KF * weight_KF).sum(1, keepdim=True)
        values, vectors = torch.linalg.eigh(covariance_FF)
        spread_FF = vectors * values.clamp(min=0).sqrt()
        return cls(
            weight_KF=weight_KF,
            bias_K=bias_K,
            photo_mean_F=photo_mean_F,
            towards_KF=towards_KF,
            spread_FF=spread_FF,
        )

    def opinion(self, features_BF: Tensor) -> Tensor:
        """[B, F] → [B, K]: the classifier's probabilities."""
        return (features_BF @ self.weight_KF.T + self.bias_K).softmax(-1)

    def draw(self, pictures_BF: Tensor, generator: torch.Generator) -> Tensor:
        """As many features as pictures are given, half of them moved from these."""
        count, device = len(pictures_BF), pictures_BF.device

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, 1, generator=generator, device=device) * (high - low) + low

        noise_BF = torch.randn(count, len(self.photo_mean_F), generator=generator, device=device)
        photos_BF = self.photo_mean_F + (noise_BF @ self.spread_FF.T) * uniform(0.2, 0.8)
        base_BF = torch.where(uniform(0, 1) < 0.5, photos_BF, self._without_opinion(pictures_BF))
        wanted_B = torch.randint(len(self.bias_K), (count,), generator=generator, device=device)
        moved_BF = base_BF + self.towards_KF[wanted_B] * uniform(*_RAISED)
        return moved_BF.clamp(min=0)

    def raised(self, nats: float) -> Tensor:
        """[K, F]: the mean photo moved towards each class."""
        return (self.photo_mean_F + nats * self.towards_KF).clamp(min=0)

    def _without_opinion(self, features_BF: Tensor) -> Tensor:
        """Moved back from the class that the classifier prefers."""
        logits_BK = features_BF @ self.weight_KF.T + self.bias_K
        best_B1, which_B1 = logits_BK.max(-1, keepdim=True)
        excess_B1 = (best_B1 - logits_BK.mean(-1, keepdim=True)) * 0.5
        return features_BF - self.towards_KF[which_B1[:, 0]] * excess_B1


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
