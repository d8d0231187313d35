"""Live bytes of tensors on one device, counted as operators make and free them.

Enters: a program run inside the mode, on real or on fake tensors. Leaves: bytes that live now, and their
peak. Called by the estimate. On fake tensors nothing is allocated, and the device need not be there.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
# Allocators round up to this; many small tensors would otherwise seem to cost less than they do.
_ALIGNMENT_BYTES: Final = 512


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages of `device_type`, each until the last tensor on it is gone.

    Tensors that were there before are counted when an operator first returns them; `adopt` counts them at
    once.

    Attributes:
        now: bytes that live.
        peak: the most that lived at once.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type
        self._known: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def adopt(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, unless it is known."""
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or _NOTHING))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.adopt(leaf)
        return result
