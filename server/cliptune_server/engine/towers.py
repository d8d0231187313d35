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
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliptune.errors import OverloadedError
from cliptune_model.acceleration.fidelity import Autocast
from cliptune_model.acceleration.frozen import freeze
from cliptune_model.acceleration.graphs import Forward, Graphs, Shape, cuda_recorder, shapes
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.machine.device import device_memory_bytes, free_memory_bytes
from cliptune_model.towers.trimming import TextTrim

_log = logging.getLogger(__name__)

# Frozen and proved in a few tenths of a second.
_SMALL_BYTES: Final = 64 * 2**20
# Of the device's free memory, graphs take at most one part in so many.
_GRAPHS_SHARE: Final = 10


class Towers:
    """Forwards of one model.

    Attributes:
        clip: as it was loaded.
        autocast: around each forward.
    """

    def __init__(
        self,
        clip: Clip,
        autocast: Autocast = nullcontext,
        dtype: torch.dtype | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """`autocast`: around each forward, where a lower precision (`dtype`) was found near enough.
        `image_size`: (height, width) that most images have; None: the model's own."""
        self.clip: Final = clip
        self._frozen = Choice(subject="frozen_towers", value="eager", reason="a faster form is being made")
        self._serving = clip
        self._image_size: Final = image_size or clip.image_size
        self._graphs: Graphs | None = None
        self._unrecorded: list[Shape] | None = None
        self.autocast: Final = autocast
        self._dtype: Final = dtype
        self._device: Final = clip.device
        clip.model.eval().requires_grad_(False)
        clip.similarity.eval().requires_grad_(False)

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        """N of [3, H, W] → [N, 3, H, W]; N of [L] int64, padded with 0 → [N, longest L].

        On the CPU, pinned where the device is a GPU, so that the copy does not hold up the host; on the
        device where one of them is there already.
        """
        if rows[0].ndim == 1:
            stacked = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        elif any(row.device.type != "cpu" for row in rows):  # decoded there
            stacked = torch.stack([row.to(self._device, non_blocking=True) for row in rows])
        else:
            stacked = torch.stack(list(rows))
        return stacked.pin_memory() if self._device.type == "cuda" and not stacked.is_cuda else stacked

    @property
    def form(self) -> Choice:
        """What the forwards compute by, and why; later ones may be faster, with the same results."""
        graphs = None if self._graphs is None else self._graphs.choice
        if graphs is None:
            return self._frozen
        value = f"{self._frozen.value}, graphs" if graphs.value == "on" else self._frozen.value
        return Choice(subject="towers", value=value, reason=f"{self._frozen.reason}; {graphs.reason}")

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
            autocast=self.autocast,
            room_bytes=free_memory_bytes(str(self._device)),
            stopped=stopped,
        )
        self._serving, self._frozen = frozen.clip, frozen.choice
        _log.info("%s = %s: %s", frozen.choice.subject, frozen.choice.value, frozen.choice.reason)

    def record_next(self) -> bool:
        """Records one more small batch as a CUDA graph, in milliseconds. False: there are no more.

        On the device's thread, when `freeze` has ended: a graph holds the weights that it was recorded with.
        """
        if self._device.type != "cuda":
            return False
        if self._unrecorded is None:
            lengths = TextTrim.of(self.clip.model, self.clip.context_length).lengths
            self._unrecorded = shapes(self._image_size, lengths)
            self._graphs = Graphs(
                images=self._encode_images,
                texts=self._encode_texts,
                record=cuda_recorder(),
                device=self._device,
                room_bytes=free_memory_bytes(str(self._device)) // _GRAPHS_SHARE,
                held_bytes=partial(device_memory_bytes, str(self._device)),
            )
        graphs = self._graphs
        if graphs is None or not self._unrecorded:
            return False
        return graphs.add(self._unrecorded.pop(0))

    @torch.inference_mode()
    def images(self, images_NCHW: Tensor) -> npt.NDArray[np.float32]:
        """[N, 3, H, W] → [N, D]."""
        return self._features(self._encode_images, images_NCHW)

    @torch.inference_mode()
    def texts(self, tokens_NL: Tensor) -> npt.NDArray[np.float32]:
        """[N, L] int64 → [N, D]."""
        return self._features(self._encode_texts, tokens_NL)

    def _features(self, forward: Forward, batch: Tensor) -> npt.NDArray[np.float32]:
        count = len(batch)
        try:
            found_ND = None if self._graphs is None else self._graphs.run(batch)
            if found_ND is None:
                if self._device.type == "mps":
                    batch = in_few_shapes(batch)
                found_ND = forward(batch.to(self._device, non_blocking=True))[:count]
            return self._numpy(found_ND)
        except RuntimeError as error:
            raise _told(error) from error

    def _encode_images(self, images_NCHW: Tensor) -> Tensor:
        with self.autocast():
            return self._serving.encode_images(images_NCHW)

    def _encode_texts(self, tokens_NL: Tensor) -> Tensor:
        with self.autocast():
            return self._serving.encode_texts(tokens_NL)

    def _numpy(self, features_ND: Tensor) -> npt.NDArray[np.float32]:
        rows_ND: npt.NDArray[np.float32] = self.clip.similarity.kept(features_ND).cpu().numpy()
        return rows_ND


def in_few_shapes(batch: Tensor) -> Tensor:
    """[N, ...] → the next power of two of rows, the last one repeated.

    For Apple's GPU, which keeps a graph of each shape that it has seen and forgets none (pytorch#132596).
    """
    missing = (1 << (len(batch) - 1).bit_length()) - len(batch)
    return batch if not missing else torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])


def _told(error: RuntimeError) -> Exception:
    """A device without memory is told apart: a smaller batch may fit."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return OverloadedError("the device has not enough memory for this forward")
    return error
