"""What `cliptune doctor` proved, or found broken, on this machine: `<home>/proofs.json`.

Enters: a home and the machine. Leaves: `Proofs`, which `policy` heeds; doctor writes them, trainer and engine
read them. A proof counts for one device, torch, system and chip: after an update nothing is known again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cliptune.durable import write_atomically
from cliptune_model.machine.hardware import Machine

_log = logging.getLogger(__name__)

FILE: Final = "proofs.json"
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """One computation, compared with the CPU's."""

    holds: bool
    told: str  # what was compared, and the difference


@dataclass(frozen=True, kw_only=True, slots=True)
class Proofs:
    """Findings by name (`cliptune_model.proving` lists them). Empty: nothing is known."""

    found: Mapping[str, Proof] = field(default_factory=dict)

    def failed(self, name: str) -> Proof | None:
        """The proof of this name, if it was tried and failed."""
        proof = self.found.get(name)
        return proof if proof is not None and not proof.holds else None

    def holds(self, name: str) -> bool:
        """It was tried and holds. False: failed, or not known."""
        proof = self.found.get(name)
        return proof is not None and proof.holds


UNKNOWN: Final = Proofs()


def load_proofs(home: Path, device: str, machine: Machine) -> Proofs:
    """What is known of `device` on `machine`. A missing or damaged file: nothing."""
    entry = _read(home / FILE).get(device_key(device, machine), {})
    try:
        return Proofs(found={name: Proof(**proof) for name, proof in entry.items()})
    except (TypeError, AttributeError):
        return UNKNOWN


def save_proofs(home: Path, device: str, machine: Machine, proofs: Proofs) -> None:
    """Replaces what is known of `device` on `machine`; other devices' proofs stay. Raises `OSError`."""
    entries = _read(home / FILE)
    entries[device_key(device, machine)] = {name: asdict(proof) for name, proof in proofs.found.items()}
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / FILE, json.dumps({"format": FORMAT, "proofs": entries}, indent=1).encode())


def device_key(device: str, machine: Machine) -> str:
    """What findings hold for: one device, torch, system and chip."""
    name = machine.gpu_name or machine.chip
    return f"{device} | torch {machine.torch_version} | {machine.system} {machine.os_version} | {name}"


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        entries = told["proofs"] if told["format"] == FORMAT else {}
        return entries if isinstance(entries, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be read (%r): run cliptune doctor to write it anew", path, error)
        return {}
