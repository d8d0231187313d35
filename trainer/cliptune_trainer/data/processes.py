"""Processes that work for this one: spawned, and gone when it is.

Enters: a function that prepares such a process. Leaves: a `ProcessPoolExecutor`. Called by `pools` and
`samples`. Spawned, never forked: neither a gRPC channel nor a device survives a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def spawned(workers: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool of `workers` processes, each of which runs `prepare(*arguments)` first."""
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(prepare, arguments),
    )


def _begin(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # The trainer alone decides when to stop: a signal sent to the whole group must not take its images away.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A killed trainer leaves no orphans."""
    parent.join()
    os._exit(1)
