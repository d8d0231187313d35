"""What was measured of a model's faster ways, kept beside it: `cliptune_served.json` in its folder.

Enters: a model's folder and the device. Leaves: cosines by way ("bf16", "fp16", "fast"), which `fidelity.py`
then need not measure again. Read and written by the engine when it loads a model. Not part of the manifest,
which is whole before any device has served the model, and says the same wherever the folder is copied: a
cosine belongs to one device, torch and chip, and to these very weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cliptune.durable import write_atomically
from cliptune_model.machine.hardware import Machine
from cliptune_model.machine.proofs import device_key

_log = logging.getLogger(__name__)

FILE: Final = "cliptune_served.json"
FORMAT: Final = 1
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth")


def read_measured(folder: Path, device: str, machine: Machine) -> dict[str, float]:
    """What is known of the weights in `folder` on `device`. A missing or damaged file: nothing."""
    entry = _read(folder).get(device_key(device, machine))
    if not isinstance(entry, dict) or entry.get("weights") != _stamp(folder):
        return {}
    cosines = entry.get("cosines")
    if not isinstance(cosines, dict):
        return {}
    return {str(way): float(value) for way, value in cosines.items() if isinstance(value, float)}


def write_measured(folder: Path, device: str, machine: Machine, cosines: Mapping[str, float]) -> None:
    """Keeps them, where the folder can be written; what is known of other devices stays."""
    kept = {way: value for way, value in cosines.items() if math.isfinite(value)}
    entry = {"weights": _stamp(folder), "cosines": kept}
    content = {"format": FORMAT, "devices": {**_read(folder), device_key(device, machine): entry}}
    try:
        write_atomically(folder / FILE, json.dumps(content, indent=1).encode())
    except OSError as error:  # it is measured again at the next load
        _log.info("%s cannot keep what was measured: %s", folder, error)


def _stamp(folder: Path) -> list[list[object]]:
    """Changes with the weights, without reading them."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path in files if (stat := path.stat())]


def _read(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        devices = told["devices"] if told["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return devices if isinstance(devices, dict) else {}
