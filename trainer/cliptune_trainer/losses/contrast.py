"""All that a loss may look at: a batch of pairs as the towers and the similarity leave it.

Enters: features of both towers, prepared by the similarity; scale, bias, and who is who. Leaves: tables of
similarities and logits. Made by the objective, given to every loss.
N: pairs in the batch, M: further captions, P: numbers of a prepared vector (D for the cosine).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cliptune_model.similarity import widened
from cliptune_trainer.losses.identities import Identities


def identity(products: Tensor) -> Tensor:
    """What makes similarities of inner products where they are the same: for the cosine."""
    return products


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """What the model that training started from makes of the same batch; without gradients.

    Attributes:
        image_ND, text_ND: as its own similarity prepares them, fp32.
        logit_scale: its own, scalar.
        of_products: makes its similarities of inner products.
    """

    image_ND: Tensor
    text_ND: Tensor
    logit_scale: Tensor
    of_products: Callable[[Tensor], Tensor] = identity

    def logits(self) -> Tensor:
        """Its table, images by texts: [N, N] fp32."""
        return self.logit_scale * self.of_products(self.image_ND @ self.text_ND.T)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """A batch. Row i of the images belongs to row i of the texts.

    Attributes:
        image_NP, text_NP: prepared by the similarity (of unit length for the cosine).
        logit_scale: scalar, what similarities are multiplied by.
        logit_bias: scalar, added to every logit by losses that judge each pair alone; None: the model has
            none.
        identities: which rows share image, caption or label.
        of_products: makes similarities of inner products, number by number.
        in_modal: images prepared as texts and texts as images, [N, P] each, to compare a tower with itself;
            None: both are prepared alike.
        negative_text_MP: captions that are wrong for every image, prepared; None: there are none.
        negative_ids_M: the caption id of each of them; -1: the data has no such caption; -2: it is none, pass
            it over.
        teacher: what the starting model makes of the batch; None: it is not asked.
    """

    image_NP: Tensor
    text_NP: Tensor
    logit_scale: Tensor
    identities: Identities
    logit_bias: Tensor | None = None
    of_products: Callable[[Tensor], Tensor] = identity
    in_modal: Callable[[], tuple[Tensor, Tensor]] | None = None
    negative_text_MP: Tensor | None = None
    negative_ids_M: Tensor | None = None
    teacher: Teacher | None = None

    def __len__(self) -> int:
        return len(self.image_NP)

    def similarities(self) -> Tensor:
        """Every image with every text: [N, N], fp32 (fp64 for fp64)."""
        return self.of_products(widened(self.image_NP) @ widened(self.text_NP).T)

    def logits(self) -> Tensor:
        """Similarities times the scale: [N, N], fp32 (fp64 for fp64)."""
        return widened(self.logit_scale) * self.similarities()

    def negative_logits(self) -> Tensor:
        """Every image with every wrong caption: [N, M], -inf where a caption says nothing wrong of an image.

        Raises ValueError where there are no such captions.
        """
        if self.negative_text_MP is None or self.negative_ids_M is None:
            raise ValueError("the loss needs wrong captions, and the batch has none")
        products_NM = widened(self.image_NP) @ widened(self.negative_text_MP).T
        # A caption of the batch that a wrong one happens to equal, of this image or of another row with it.
        ids = self.identities
        equal_NM = ids.caption_ids_N[:, None] == self.negative_ids_M[None, :]
        same_image_NN = ids.image_ids_N[:, None] == ids.image_ids_N[None, :]
        right_NM = (same_image_NN.float() @ equal_NM.float()) > 0
        passed_NM = right_NM | (self.negative_ids_M == NO_CAPTION)[None, :]
        logits_NM = widened(self.logit_scale) * self.of_products(products_NM)
        return logits_NM.masked_fill(passed_NM, -torch.inf)

    def within_towers(self) -> tuple[Tensor, Tensor]:
        """Every image with every image, every text with every text: [N, N] similarities each."""
        image_NP, text_NP = widened(self.image_NP), widened(self.text_NP)
        if self.in_modal is None:
            other_image_NP, other_text_NP = image_NP, text_NP
        else:
            other_image_NP, other_text_NP = self.in_modal()
        return self.of_products(image_NP @ other_image_NP.T), self.of_products(other_text_NP @ text_NP.T)


NO_CAPTION = -2
"""In `negative_ids_M`: this row's caption could not be made wrong."""


Loss = Callable[[Contrast], Tensor]
"""A pure function to a scalar, fp32 (fp64 for fp64), differentiable in all that is a tensor with gradients.
Parameters of a loss are keyword arguments and are bound beforehand."""


def both_ways(of_rows: Callable[[Tensor], Tensor], logits_NN: Tensor) -> Tensor:
    """The mean over images and over texts of what a function [N, N] → [N] makes of the table's rows."""
    return 0.5 * (of_rows(logits_NN).mean() + of_rows(logits_NN.T).mean())


def log_sum_over(logits_NN: Tensor, among_NN: Tensor) -> Tensor:
    """Log-sum-exp of each row over the columns that are marked, [N]; -inf where none is, without gradient."""
    return torch.logsumexp(logits_NN.masked_fill(~among_NN, -torch.inf), dim=1)
