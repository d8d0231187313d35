"""How images are read: by how many processes, and how exactly.

Enters: what the spec says, the device, the rows. Leaves: `Choice`s. Called by `decide`.
"""

from __future__ import annotations

from typing import Final

import torch

from cliptune_model.choice import Choice
from cliptune_model.machine.device import choose_threads

# Below so many rows a process costs more to start than it saves.
_ROWS_PER_WORKER: Final = 500
_MAX_WORKERS: Final = 32


def choose_workers(wanted: int | None, device: str, rows: int) -> Choice:
    """Decoding processes; "0": threads of the trainer."""
    if wanted is not None:
        return _workers(wanted, "asked for")
    if torch.device(device).type == "cpu":
        return _workers(0, "the towers themselves take the cores: threads between them are enough")
    cores = int(choose_threads(None).value)
    if cores < 3:
        return _workers(0, f"{cores} cores: the trainer needs them itself")
    if rows < _ROWS_PER_WORKER:
        return _workers(0, f"{rows} rows are read before processes have started")
    # One core stays with the trainer, which keeps the device busy.
    count = min(cores - 1, rows // _ROWS_PER_WORKER, _MAX_WORKERS)
    return _workers(count, f"{cores} cores, one for the trainer itself; {rows} rows")


def choose_decode(wanted: str, device: str) -> Choice:
    """ "exact" or "fast" for training images; wanted may be "auto"."""
    if wanted != "auto":
        return Choice(subject="decode", value=wanted, reason="asked for")
    if torch.device(device).type == "cpu":
        return Choice(
            subject="decode", value="exact", reason="the towers take far longer than the images on the CPU"
        )
    return Choice(
        subject="decode",
        value="fast",
        reason=f"{device} waits for images: large JPEGs are decoded at a fraction of their size",
    )


def _workers(count: int, reason: str) -> Choice:
    return Choice(subject="loader_workers", value=str(count), reason=reason)
