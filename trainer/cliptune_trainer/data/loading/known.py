"""What frozen towers make of a job's images and texts, computed once and looked up with every batch.

Enters: tables of features, and which rows of them a batch has. Leaves: features for the step, on the device
that the tables are on; it is never waited for. Made by `steps.frozen_features`, read by the loader.

B: pairs in a batch, I: images, T: texts, D: embedding dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownFeatures:
    """Features as the towers leave them, fp32, not normalised.

    Attributes:
        images_ID: by image id; None: not known.
        texts_TD: None: not known.
        text_rows: each text's row of `texts_TD`; every caption that may be drawn is there.
    """

    images_ID: Tensor | None = None
    texts_TD: Tensor | None = None
    text_rows: Mapping[str, int] | None = None

    def of_images(self, image_ids_B: Tensor) -> Tensor | None:
        """[B, D], if they are known."""
        return None if self.images_ID is None else _rows(self.images_ID, image_ids_B)

    def of_texts(self, rows_B: Tensor | None) -> Tensor | None:
        """[B, D], if they are known; `rows_B`: of the table."""
        return None if self.texts_TD is None or rows_B is None else _rows(self.texts_TD, rows_B)


def _rows(table_ND: Tensor, rows_B: Tensor) -> Tensor:
    beside = table_ND.device.type == "cuda"
    return table_ND.index_select(0, rows_B.to(table_ND.device, non_blocking=beside))
