"""What a step minimises: losses over one batch, weighed and added, with what they learn themselves.

Enters: features of a batch as the towers leave them, and who is who. Leaves: a scalar. Called by the step,
through accumulation, once a batch. Its own parameters (weights that are learned) join the optimizer and the
checkpoint; the scale and the bias are the model's, the similarity and what that learns are the `Clip`'s.

N: pairs in the batch, D: embedding dimension, P: numbers of a prepared vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, cast

import torch
from torch import Tensor, nn

from cliptune_model.similarity import Similarity
from cliptune_trainer.losses import temperature
from cliptune_trainer.losses.config import UNCERTAINTY, LossConfig, Term
from cliptune_trainer.losses.contrast import Contrast, Loss, Teacher
from cliptune_trainer.losses.entry import BIAS
from cliptune_trainer.losses.gather import gathered, ranks
from cliptune_trainer.losses.identities import Identities

# A learned weight stays within e^-4 and e^4: a loss that is all but solved must not drown the others.
_MAX_LOG_VARIANCE: Final = 4.0


class Comparing(Protocol):
    """A model as far as an objective looks at it; a `Clip` is one."""

    model: nn.Module
    similarity: Similarity


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """A whole batch as the towers leave it, fp32, not normalised, and who is who.

    Attributes:
        image_ND, text_ND: row i belongs to row i.
        identities: of the rows.
        negative_ND: of captions that are wrong for every image; None: there are none.
        negative_ids_N: see `Contrast`.
        teacher: see `Contrast`.
    """

    image_ND: Tensor
    text_ND: Tensor
    identities: Identities
    negative_ND: Tensor | None = None
    negative_ids_N: Tensor | None = None
    teacher: Teacher | None = None


class Objective(nn.Module):
    """Call it with a model and a batch's `Features`.

    Args:
        config: what to minimise. Default: InfoNCE.
        block: side of a tile; None: tables are taken whole.
        products: bf16 to multiply in bf16 on CUDA although features are fp32; only in tiles.

    Attributes:
        config: as given.
        log_variances: of the terms, where their weights are learned; else None.
    """

    def __init__(
        self,
        config: LossConfig | None = None,
        *,
        block: int | None = None,
        products: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self._block, self._products = block, products
        self.log_variances: nn.Parameter | None = None
        if self.config.weighting == UNCERTAINTY:
            self.log_variances = nn.Parameter(torch.zeros(len(self.config.terms)))

    def forward(self, clip: Comparing, features: Features) -> Tensor:
        """The loss over the batch of all ranks; scalar, fp32 (fp64 for fp64 features).

        With Matryoshka dimensions: the mean over all widths (Kusupati et al. 2022, Eq. 1, equal weights).
        """
        if ranks() > 1:
            features = _of_all_ranks(features)
        widths = (*self.config.matryoshka_dims, None)
        values = [self.weighed(self._contrast(clip, features, width)) for width in widths]
        return torch.stack(values).mean() if len(values) > 1 else values[0]

    def weighed(self, contrast: Contrast) -> Tensor:
        """The terms over one width, weighed and added.

        Learned weights as Kendall et al. 2018, Eq. 7 in the form that they train: with s = log σ² of a term,
        exp(-s) L + s / 2.
        """
        total: Tensor | None = None
        for place, term in enumerate(self.config.terms):
            value = term.weight * self._bound(term)(contrast)
            if self.log_variances is not None:
                s = self.log_variances[place]
                value = torch.exp(-s) * value + 0.5 * s
            total = value if total is None else total + value
        assert total is not None
        return total

    def _bound(self, term: Term) -> Loss:
        entry = term.entry(self.config.temperature)
        if self._block is None or entry.tiled is None:
            return partial(entry.function, **term.parameters)
        return partial(entry.tiled, block=self._block, products=self._products, **term.parameters)

    def _contrast(self, clip: Comparing, features: Features, width: int | None) -> Contrast:
        """What the losses see; only the first `width` dimensions of every feature, if there is one."""
        similarity, model = clip.similarity, clip.model
        bias = getattr(model, "logit_bias", None) if BIAS in self.config.needs else None
        image_ND, text_ND, negative_ND = (
            None if one is None else _narrowed(one, width)
            for one in (features.image_ND, features.text_ND, features.negative_ND)
        )
        assert image_ND is not None
        assert text_ND is not None

        def in_modal() -> tuple[Tensor, Tensor]:
            return similarity.prepare_texts(image_ND), similarity.prepare_images(text_ND)

        return Contrast(
            image_NP=similarity.prepare_images(image_ND),
            text_NP=similarity.prepare_texts(text_ND),
            # Some models keep them as tensors of one number.
            logit_scale=cast(Tensor, model.logit_scale).exp().reshape(()),
            logit_bias=None if bias is None else bias.reshape(()),
            identities=features.identities,
            of_products=similarity.of_products,
            in_modal=in_modal,
            negative_text_MP=None if negative_ND is None else similarity.prepare_texts(negative_ND),
            negative_ids_M=features.negative_ids_N,
            teacher=features.teacher,
        )

    @torch.no_grad()
    def constrain(self, clip: Comparing) -> None:
        """Brings all that is learned beside the towers back into its bounds; after each step."""
        temperature.clamp(clip.model, self.config)
        if clip.similarity.unit and BIAS in self.config.needs:
            temperature.clamp_bias(clip.model, self.config)
        clip.similarity.constrain()
        if self.log_variances is not None:
            self.log_variances.clamp_(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)

    def weights(self) -> list[float]:
        """What each term is multiplied by now; waits for the device."""
        fixed = [term.weight for term in self.config.terms]
        if self.log_variances is None:
            return fixed
        learned = torch.exp(-self.log_variances.detach()).tolist()
        return [weight * factor for weight, factor in zip(fixed, learned, strict=True)]

    def told(self) -> str:
        """What it has learned itself, for a person; "": nothing is learned here. Waits for the device."""
        if self.log_variances is None:
            return ""
        pairs = zip(self.config.names, self.weights(), strict=True)
        return f"learned weights: {', '.join(f'{name} {weight:.3g}' for name, weight in pairs)}"


def _narrowed(features_ND: Tensor, width: int | None) -> Tensor:
    """Zeros beyond the first `width` numbers: what is learned of all D (a metric, say) still fits them."""
    if width is None:
        return features_ND
    kept_D = torch.arange(features_ND.shape[1], device=features_ND.device) < width
    return features_ND * kept_D.to(features_ND.dtype)


def _of_all_ranks(features: Features) -> Features:
    identities, teacher = features.identities, features.teacher
    labels_NC, negative_ND = identities.labels_NC, features.negative_ND
    return replace(
        features,
        image_ND=gathered(features.image_ND),
        text_ND=gathered(features.text_ND),
        identities=replace(
            identities,
            image_ids_N=gathered(identities.image_ids_N),
            caption_ids_N=gathered(identities.caption_ids_N),
            labels_NC=None if labels_NC is None else gathered(labels_NC),
        ),
        negative_ND=None if negative_ND is None else gathered(negative_ND),
        negative_ids_N=None if features.negative_ids_N is None else gathered(features.negative_ids_N),
        teacher=None
        if teacher is None
        else replace(teacher, image_ND=gathered(teacher.image_ND), text_ND=gathered(teacher.text_ND)),
    )
