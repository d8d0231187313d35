"""Which rows of a batch show the same image or carry the same caption."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identities:
    """Rows with one id are the same image, or the same caption. int64 [N], on the features' device."""

    image_ids_N: Tensor
    caption_ids_N: Tensor

    def same(self, rows: slice = _ALL, columns: slice = _ALL) -> Tensor:
        """Whether two rows share image or caption, bool [rows, columns]; symmetric."""
        captions_N, images_N = self.caption_ids_N, self.image_ids_N
        return (captions_N[rows, None] == captions_N[None, columns]) | (
            images_N[rows, None] == images_N[None, columns]
        )
