"""Silence for packages that warn about what is judged here anyway.

Enters: a pattern of module names. Leaves: a context in which their warnings are dropped. Used around decoders
of images, which warn about odd metadata. `warnings.catch_warnings` does not nest across threads, so threads
that decode share one filter, which leaves with the last of them.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any


class Quiet:
    """Enter it from any thread, as often as needed. `modules`: a regular expression of the modules' names."""

    def __init__(self, modules: str) -> None:
        self._modules = modules
        self._lock = threading.Lock()
        self._entered = 0
        self._filter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                warnings.filterwarnings("ignore", module=self._modules)
                self._filter = warnings.filters[0]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._filter in warnings.filters:
                warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
