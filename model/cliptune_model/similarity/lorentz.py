"""Distances in hyperbolic space, where there is room for trees: general texts near the root, images far out.

Desai et al. 2023 (MERU), sections 2 and 3, without its entailment loss.

Shape suffixes: N, M rows, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from cliptune_model.similarity.base import Bounds, Similarity, widened

# As MERU: the curvature stays within a tenth and ten times of its start, scales below 1.
_CURVATURE_RANGE: Final = math.log(10.0)
# sinh beyond this leaves what fp32 can subtract.
_LONGEST: Final = math.asinh(2.0**15)
_SHORTEST: Final = 1e-8
# Below 1 + this the inverse hyperbolic cosine is steeper than fp32 can bear.
_EDGE: Final = 1e-6


class Lorentz(Similarity):
    """Minus the geodesic distance on the hyperboloid of curvature -c: at most 0.

    Features, scaled, are vectors v of the tangent space at the origin. The exponential map lifts them:
    x = sinh(√c |v|) / (√c |v|) v, with the time component √(1/c + |x|²). The product of prepared vectors
    [x, x_time] . [y, -y_time] is the Lorentzian inner product, and the distance is acosh(-c <x, y>) / √c.
    c and a scale for each tower are learned. A client's vectors are the space components x. Prompts of a
    class are averaged in the tangent space, as MERU's evaluation does.
    """

    name = "lorentz"
    linear = False
    accepts: ClassVar[Mapping[str, Bounds]] = {
        "curvature": Bounds(0.001, 1000.0, "c at the start; 1 if not given"),
        "image_scale": Bounds(1e-6, 1.0, "what image features are multiplied by at the start; 1/√D"),
        "text_scale": Bounds(1e-6, 1.0, "what text features are multiplied by at the start; 1/√D"),
    }

    def __init__(self, dim: int, parameters: Mapping[str, float] | None = None) -> None:
        super().__init__(dim, parameters)
        given, usual = self.parameters_given, 1.0 / math.sqrt(max(dim, 1))
        self._log_start = math.log(given.get("curvature", 1.0))
        self.log_curvature = nn.Parameter(torch.tensor(self._log_start))
        self.log_image_scale = nn.Parameter(torch.tensor(math.log(given.get("image_scale", usual))))
        self.log_text_scale = nn.Parameter(torch.tensor(math.log(given.get("text_scale", usual))))

    def prepare_images(self, image_ND: Tensor) -> Tensor:
        """[x, x_time], P = D + 1."""
        return torch.cat(self._lifted(image_ND, self.log_image_scale), dim=-1)

    def prepare_texts(self, text_MD: Tensor) -> Tensor:
        """[y, -y_time], P = D + 1."""
        space_MD, time_M1 = self._lifted(text_MD, self.log_text_scale)
        return torch.cat([space_MD, -time_M1], dim=-1)

    def of_products(self, products: Tensor) -> Tensor:
        """-acosh(-c p) / √c; below -c p = 1 + 1e-6 along its tangent: equal points have a gradient."""
        curvature = self.log_curvature.exp()
        argument = -curvature * products
        far = argument.clamp(min=1.0 + _EDGE)
        near = (argument - far) / math.sqrt(_EDGE * (2.0 + _EDGE))
        return -(torch.acosh(far) + near) / curvature.sqrt()

    def image_vectors(self, image_ND: Tensor) -> Tensor:
        """Space components on the hyperboloid."""
        return self._lifted(image_ND, self.log_image_scale)[0]

    def text_vectors(self, text_ND: Tensor) -> Tensor:
        """Space components on the hyperboloid."""
        return self._lifted(text_ND, self.log_text_scale)[0]

    @torch.no_grad()
    def constrain(self) -> None:
        """As MERU: the curvature within a tenth and ten times of its start, scales at most 1."""
        self.log_curvature.clamp_(self._log_start - _CURVATURE_RANGE, self._log_start + _CURVATURE_RANGE)
        self.log_image_scale.clamp_(max=0.0)
        self.log_text_scale.clamp_(max=0.0)

    def values(self) -> dict[str, float]:
        """Curvature and scales as they are now."""
        return {
            "curvature": float(self.log_curvature.detach().exp()),
            "image_scale": float(self.log_image_scale.detach().exp()),
            "text_scale": float(self.log_text_scale.detach().exp()),
        }

    def _lifted(self, features_ND: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Points on the hyperboloid: space components [N, D] and time components [N, 1]."""
        curvature = self.log_curvature.exp()
        tangent_ND = log_scale.exp() * widened(features_ND)
        # The norm has no gradient at 0; this has.
        length_N1 = (curvature * tangent_ND.square().sum(dim=-1, keepdim=True) + _SHORTEST**2).sqrt()
        space_ND = torch.sinh(length_N1.clamp(max=_LONGEST)) / length_N1 * tangent_ND
        time_N1 = (1.0 / curvature + space_ND.square().sum(dim=-1, keepdim=True)).sqrt()
        return space_ND, time_N1
