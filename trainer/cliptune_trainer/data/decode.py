"""From an image file to the model's input, in a thread or in a process of its own.

Enters: a path with (epoch, row). Leaves: preprocessed pixels. Called by the loader and by evaluation.
Processes are spawned, never forked: neither a gRPC channel nor a device survives a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from cliptune_model.pixels import decode_image
from cliptune_trainer.data.augment import augment

Pixels: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]  # [3, H, W]
_MAX_THREADS: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Opens, augments and preprocesses an image.

    `preprocess` maps an RGB image to float32 [3, H, W]; it must be picklable for processes.
    """

    preprocess: Callable[[Image.Image], Tensor]
    augmentation: str = "none"
    seed: int = 0

    def __call__(self, image: Path, epoch: int, row: int) -> Pixels:
        """Pixels [3, H, W] of an image file. Raises OSError, `ImageDecodeError` or `ImageSizeError`."""
        decoded = decode_image(image.read_bytes())
        augmented = augment(decoded, self.augmentation, seed=self.seed, epoch=epoch, row=row)
        pixels: Pixels = self.preprocess(augmented).numpy()
        return pixels


def thread_pool() -> ThreadPoolExecutor:
    """Threads that decode: Pillow releases the interpreter's lock."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), thread_name_prefix="decode")


def process_pool(workers: int, decoder: Decoder) -> ProcessPoolExecutor:
    """Spawned processes, each holding `decoder`; give them `work`."""
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(decoder,),
    )


def work(image: Path, epoch: int, row: int) -> Pixels:
    """Runs the process's decoder."""
    if _worker_decoder is None:
        raise RuntimeError("not a decoding process")
    return _worker_decoder(image, epoch, row)


_worker_decoder: Decoder | None = None


def _start_worker(decoder: Decoder) -> None:
    global _worker_decoder
    _worker_decoder = decoder
    # The trainer alone decides when to stop: a signal sent to the whole group must not take its images away.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A killed trainer leaves no orphans."""
    parent.join()
    os._exit(1)
