"""Which rows of a batch show the same image, carry the same caption or bear the same label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identities:
    """Rows with one id are the same image, or the same caption. int64 [N], on the features' device.

    Attributes:
        image_ids_N, caption_ids_N: equal ids, equal image or caption.
        labels_NC: 1 where a row bears a label, else 0; float [N, C]. None: the data has no labels.
        labels_count: `same` goes by labels too.
    """

    image_ids_N: Tensor
    caption_ids_N: Tensor
    labels_NC: Tensor | None = None
    labels_count: bool = False

    def same(self, rows: slice = _ALL, columns: slice = _ALL) -> Tensor:
        """Whether two rows belong together: they share image or caption, or a label where labels count.

        Bool [rows, columns]; symmetric.
        """
        captions_N, images_N = self.caption_ids_N, self.image_ids_N
        same_NN = (captions_N[rows, None] == captions_N[None, columns]) | (
            images_N[rows, None] == images_N[None, columns]
        )
        if self.labels_count:
            labels_NC = self.labels()
            same_NN |= labels_NC[rows] @ labels_NC[columns].T > 0
        return same_NN

    def alike(self) -> Tensor:
        """How much of their labels two rows share: the cosine of their multi-hot vectors, [N, N] float.

        1 between rows that share image or caption, whatever their labels; 0 where one has no label.
        """
        unit_NC = torch.nn.functional.normalize(self.labels(), dim=1)
        return torch.where(self.same(), 1.0, unit_NC @ unit_NC.T)

    def by_label(self) -> Self:
        """The same rows, of which those that share a label belong together."""
        return replace(self, labels_count=True)

    def labels(self) -> Tensor:
        """`labels_NC`. Raises ValueError where the data has none."""
        if self.labels_NC is None:
            raise ValueError("the loss goes by labels, and the batch has none")
        return self.labels_NC
