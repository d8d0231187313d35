"""Contrastive losses by name.

Enters: unit features of both towers, the logit scale, and which rows share an image or a caption. Leaves: a
scalar. Called by the step. A loss is a pure function; a new one is a file here and a line in `LOSSES`.
"""

from __future__ import annotations

from typing import Final, Protocol

from torch import Tensor

from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.infonce import infonce
from cliptune_trainer.losses.multi_positive import multi_positive

__all__ = ["LOSSES", "Identities", "Loss", "infonce", "multi_positive"]


class Loss(Protocol):
    """What every loss takes and gives."""

    def __call__(
        self,
        image_ND: Tensor,
        text_ND: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        identities: Identities,
    ) -> Tensor:
        """Features of unit length, logit scale (exponentiated) and bias (if the model has one), who is who.

        Returns a scalar, fp32.
        """
        ...


LOSSES: Final[dict[str, Loss]] = {"infonce": infonce, "multi_positive": multi_positive}
