"""InfoNCE that keeps the geometry of images and of texts the same."""

from __future__ import annotations

from torch import Tensor

from cliptune_trainer.losses.contrast import Contrast
from cliptune_trainer.losses.infonce import infonce


def cyclip(contrast: Contrast, *, in_modal: float = 0.25, cross_modal: float = 0.25) -> Tensor:
    """InfoNCE and both consistency losses; scalar.

    Goel et al. 2022 (CyCLIP), Eq. 2 to 4: with similarities s, the sums over all pairs of rows of
    (s(image j, text k) - s(image k, text j))² and (s(image j, image k) - s(text j, text k))², over N.

    Args:
        contrast: the batch.
        in_modal: weight of the second, 0 or more.
        cross_modal: weight of the first, 0 or more.
    """
    value = infonce(contrast)
    if cross_modal:
        similarity_NN = contrast.similarities()
        value = value + cross_modal * (similarity_NN - similarity_NN.T).square().sum() / len(contrast)
    if in_modal:
        image_NN, text_NN = contrast.within_towers()
        value = value + in_modal * (image_NN - text_NN).square().sum() / len(contrast)
    return value
