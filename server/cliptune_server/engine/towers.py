"""The two towers of a loaded CLIP, as the batcher's forwards.

Enters: preprocessed images or tokens, stacked, on the CPU. Leaves: features as numpy, of unit length where
the model's similarity looks at directions alone. Called on the device's thread only, but for `stack`.
Computed in fp32 and in inference mode, so that a vector equals plain open_clip's to rounding.

Shape suffixes: N items, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliptune.errors import OverloadedError
from cliptune_model.acceleration.fidelity import Autocast
from cliptune_model.clip import Clip


class Towers:
    """Forwards of one model."""

    def __init__(self, clip: Clip, autocast: Autocast = nullcontext) -> None:
        """`autocast`: around each forward, where a lower precision was found near enough."""
        self.clip: Final = clip
        self._autocast: Final = autocast
        self._device: Final = clip.device
        clip.model.eval().requires_grad_(False)
        clip.similarity.eval().requires_grad_(False)

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        """N of [3, H, W] → [N, 3, H, W]; N of [L] int64, padded with 0 → [N, longest L]. On the CPU.

        Pinned where the device is a GPU, so that the copy does not hold up the host.
        """
        if rows[0].ndim == 1:
            stacked = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        else:
            stacked = torch.stack(list(rows))
        return stacked.pin_memory() if self._device.type == "cuda" else stacked

    @torch.inference_mode()
    def images(self, images_NCHW: Tensor) -> npt.NDArray[np.float32]:
        """[N, 3, H, W] → [N, D]."""
        try:
            on_device_NCHW = images_NCHW.to(self._device, non_blocking=True)
            with self._autocast():
                features_ND = self.clip.encode_images(on_device_NCHW)
            return self._numpy(features_ND)
        except RuntimeError as error:
            raise _told(error) from error

    @torch.inference_mode()
    def texts(self, tokens_NL: Tensor) -> npt.NDArray[np.float32]:
        """[N, L] int64 → [N, D]."""
        try:
            on_device_NL = tokens_NL.to(self._device, non_blocking=True)
            with self._autocast():
                features_ND = self.clip.encode_texts(on_device_NL)
            return self._numpy(features_ND)
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
