"""Checkpoints: everything that a killed run needs to go on as if nothing had happened.

Enters: a running training's parts. Leaves: `checkpoints/step-NNNNNNNN/`, whole or absent. Called by the loop.

    model/                 the weights as an exported model: open_clip's own format; of an adapter, it alone
    training.safetensors   optimizer state and the torch generators
    training.json          step, counters, Python's and numpy's generators, sizes and checksums of the others

A folder is filled under another name, synced and renamed, so that a kill leaves the previous one as the
newest.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cliptune.durable import sync, write_atomically
from cliptune.errors import CliptuneError
from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, manifest_of

FORMAT: Final = 1
_NAME: Final = re.compile(r"step-(\d{8,})")
_PARTIAL: Final = ".partial-"
_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """What a checkpoint holds beside the weights. `counters` are JSON values, `tensors` are on the CPU."""

    step: int
    counters: dict[str, Any]
    tensors: dict[str, Tensor]


class CorruptCheckpointError(Exception):
    """A checkpoint is not whole; an older one may be."""


def save_checkpoint(folder: Path, clip: Clip, state: TrainingState, *, keep: int, job_id: str) -> int:
    """Writes `folder/step-NNNNNNNN`, then removes all but the newest `keep`. Returns its bytes.

    A checkpoint of this step that is there already holds the same state and is kept as it is.

    Raises:
        OSError, SafetensorError, DiskFullError: it could not be written; older ones are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    target, partial = folder / f"step-{state.step:08d}", folder / f"{_PARTIAL}{state.step:08d}"
    if target.exists():
        return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    try:
        partial.mkdir()
        manifest = manifest_of(clip, job_id=job_id)
        export_model(clip, partial / "model", manifest, adapter_alone=clip.adapter is not None)
        save_file(state.tensors, partial / "training.safetensors")
        sync(partial / "training.safetensors")
        files = dict(_fingerprints(partial))
        content = {"format": FORMAT, "step": state.step, "counters": state.counters, "files": files}
        write_atomically(partial / "training.json", json.dumps(content).encode())
        partial.rename(target)
        sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return sum(size for size, _ in files.values())


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")), reverse=True)


def load_state(checkpoint: Path) -> TrainingState:
    """Everything but the weights, which are an exported model in `checkpoint/model`.

    Raises:
        CorruptCheckpointError: a file is missing, torn or altered.
    """
    try:
        content = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CorruptCheckpointError(f"{checkpoint.name} has format {content['format']}, not {FORMAT}")
        for name, fingerprint in content["files"].items():
            if _fingerprint(checkpoint / name) != tuple(fingerprint):
                raise CorruptCheckpointError(f"{checkpoint.name}: {name} is not what was written")
        tensors = load_file(checkpoint / "training.safetensors")
        return TrainingState(step=int(content["step"]), counters=content["counters"], tensors=tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, CliptuneError) as error:
        raise CorruptCheckpointError(f"{checkpoint.name}: {error}") from error


def sweep(folder: Path) -> None:
    """Removes what a kill left unfinished."""
    for entry in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(entry, ignore_errors=True)


def random_state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All random generators of the process: those that are JSON values, and those that are tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    values = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors = {"random/torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random/device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        tensors["random/device"] = torch.mps.get_rng_state()
    return values, tensors


def restore_random_state(device: torch.device, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Inverse of `random_state`. A device other than the saved one keeps its own generator."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["random/torch"])
    saved = tensors.get("random/device")
    if saved is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved, device)
    elif saved is not None and device.type == "mps":
        torch.mps.set_rng_state(saved)


def _fingerprints(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), _fingerprint(path)


def _fingerprint(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file: enough against torn writes and bad disks, which is all it is for."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
        return file.tell(), checksum
