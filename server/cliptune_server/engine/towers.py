"""The two towers of a loaded CLIP, as the batcher's forwards.

Enters: preprocessed images or tokens, stacked, on the CPU. Leaves: features as numpy, of unit length where
the model's similarity looks at directions alone. Called on the device's thread only, but for `stack` and
`freeze`. Computed in inference mode and, unless a lower precision was found near enough, in fp32, so that a
vector equals plain open_clip's to rounding.

Shape suffixes: N items, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliptune.errors import OverloadedError
from cliptune_model.acceleration.fidelity import Autocast
from cliptune_model.acceleration.frozen import freeze
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.machine.device import free_memory_bytes

_log = logging.getLogger(__name__)

# Frozen and proved in a few tenths of a second.
_SMALL_BYTES: Final = 64 * 2**20


class Towers:
    """Forwards of one model.

    Attributes:
        clip: as it was loaded.
        form: what the forwards compute by, and why; they change it once, to another with the same results.
    """

    def __init__(
        self, clip: Clip, autocast: Autocast = nullcontext, dtype: torch.dtype | None = None
    ) -> None:
        """`autocast`: around each forward, where a lower precision (`dtype`) was found near enough."""
        self.clip: Final = clip
        self.form = Choice(subject="frozen_towers", value="eager", reason="a faster form is being made")
        self._serving = clip
        self._autocast: Final = autocast
        self._dtype: Final = dtype
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

    @property
    def small(self) -> bool:
        """Whether freezing takes no longer than loading does."""
        weights = self.clip.model.parameters()
        return sum(weight.nbytes for weight in weights) <= _SMALL_BYTES and self._device.type == "cpu"

    def freeze(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Serve by frozen weights from the next forward on, if they prove themselves and there is room.

        Runs beside forwards. `stopped`: asked now and then; True ends it.
        """
        frozen = freeze(
            self.clip,
            dtype=self._dtype,
            autocast=self._autocast,
            room_bytes=free_memory_bytes(str(self._device)),
            stopped=stopped,
        )
        self._serving, self.form = frozen.clip, frozen.choice
        _log.info("%s = %s: %s", frozen.choice.subject, frozen.choice.value, frozen.choice.reason)

    @torch.inference_mode()
    def images(self, images_NCHW: Tensor) -> npt.NDArray[np.float32]:
        """[N, 3, H, W] → [N, D]."""
        try:
            on_device_NCHW = images_NCHW.to(self._device, non_blocking=True)
            with self._autocast():
                features_ND = self._serving.encode_images(on_device_NCHW)
            return self._numpy(features_ND)
        except RuntimeError as error:
            raise _told(error) from error

    @torch.inference_mode()
    def texts(self, tokens_NL: Tensor) -> npt.NDArray[np.float32]:
        """[N, L] int64 → [N, D]."""
        try:
            on_device_NL = tokens_NL.to(self._device, non_blocking=True)
            with self._autocast():
                features_ND = self._serving.encode_texts(on_device_NL)
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
