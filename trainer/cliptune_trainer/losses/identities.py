"""Which rows of a batch show the same image or carry the same caption."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Identities:
    """Rows with one id are the same image, or the same caption. int64 [N], on the features' device."""

    image_ids_N: Tensor
    caption_ids_N: Tensor
