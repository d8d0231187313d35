"""A function over one tile, fused into few kernels where that pays.

Enters: a function of tensors. Leaves: the same function, compiled on CUDA, where a tile's elementwise passes
would otherwise each travel through memory. Called by the tiled losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from cliptune_trainer.out_of_memory import is_out_of_memory

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Fused(Generic[P, R]):
    """Call it like `function`, which must not write to its arguments. Compiled at the first call on CUDA.

    Never on MPS, where torch's compiler is slower than eager (pytorch#192551), nor on the CPU, where a tile
    stays in the cache. Where compilation fails (no C compiler, say), the reason is logged once and the
    function runs as it is.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function
        self._compiled: Callable[P, R] | None = None
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why it is not compiled any more, or None."""
        return self._failure

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        """What `function` returns. Compilation errors are no errors of the caller's."""
        first = arguments[0]
        if not (isinstance(first, Tensor) and first.device.type == "cuda"):
            return self._function(*arguments, **named)
        return self.compiled(*arguments, **named)

    def compiled(self, *arguments: P.args, **named: P.kwargs) -> R:
        """Compiled whatever the device; as it is from the first failure on."""
        if self._failure is not None:
            return self._function(*arguments, **named)
        if self._compiled is None:
            self._compiled = torch.compile(self._function)
        try:
            return self._compiled(*arguments, **named)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # The reason is what the compiler said, in any of its many error classes.
            lines = str(error).strip().splitlines() or [""]
            self._failure = f"{type(error).__name__}: {lines[0]}"
            _log.warning("the loss's tiles are computed uncompiled, slower: %s", self._failure)
            return self._function(*arguments, **named)
