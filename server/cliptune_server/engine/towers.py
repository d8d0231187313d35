"""The two towers of a loaded CLIP, as the batcher's forwards.

Enters: preprocessed images or tokens, one tensor an item, on the CPU. Leaves: features as numpy, of unit
length where the model's similarity looks at directions alone. Called on the device's thread only. Computed
in fp32 and in inference mode, so that a vector equals plain open_clip's.

Shape suffixes: N items, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliptune.errors import OverloadedError
from cliptune_model.clip import Clip


class Towers:
    """Forwards of one model."""

    def __init__(self, clip: Clip) -> None:
        self.clip: Final = clip
        self._device: Final = clip.device
        clip.model.eval().requires_grad_(False)
        clip.similarity.eval().requires_grad_(False)

    @torch.inference_mode()
    def images(self, images_CHW: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """N of [3, H, W] → [N, D]."""
        try:
            return self._numpy(self.clip.encode_images(torch.stack(list(images_CHW)).to(self._device)))
        except RuntimeError as error:
            raise _told(error) from error

    @torch.inference_mode()
    def texts(self, tokens_L: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """N of [L] int64 → [N, D]."""
        try:
            return self._numpy(self.clip.encode_texts(torch.stack(list(tokens_L)).to(self._device)))
        except RuntimeError as error:
            raise _told(error) from error

    def _numpy(self, features_ND: Tensor) -> npt.NDArray[np.float32]:
        rows_ND: npt.NDArray[np.float32] = self.clip.similarity.kept(features_ND).cpu().numpy()
        return rows_ND


def _told(error: RuntimeError) -> Exception:
    """A device without memory is told apart: a smaller batch may fit."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return OverloadedError("the device has not enough memory for this forward")
    return error
