"""The device itself: which one is used, and what it holds.

Enters: what the user asked for ("auto" or a name), or a device. Leaves: a `Choice` that plans, logs and
`cliptune doctor` show, or a number of bytes. Called by the trainer, the engine and doctor.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from pathlib import Path

import torch

from cliptune.errors import InvalidInputError
from cliptune_model.choice import Choice
from cliptune_model.machine import rules
from cliptune_model.machine.hardware import Machine, available_bytes, detect, host
from cliptune_model.machine.proofs import UNKNOWN, Proofs, load_proofs

__all__ = [
    "choose_device",
    "choose_precision",
    "choose_proven_device",
    "choose_threads",
    "device_memory_bytes",
    "devices",
    "free_memory_bytes",
    "memory_limit_bytes",
    "room_beside_others",
    "why_no_mps",
]


def choose_device(wanted: str) -> Choice:
    """ "auto", "cpu", "mps", "cuda" or "cuda:N" → the device.

    Raises:
        InvalidInputError: not such a name, or the device is absent; the message says why.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return Choice(subject="device", value="cuda:0", reason=f"a GPU is here: {_cuda_name(0)}")
        if torch.backends.mps.is_available():
            return Choice(subject="device", value="mps", reason=f"Apple's GPU is here: {host().chip}")
        return Choice(subject="device", value="cpu", reason=f"no GPU: {_no_cuda()}; {_no_mps()}")
    if wanted == "cpu":
        return Choice(subject="device", value="cpu", reason="asked for")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise InvalidInputError(f"device 'mps' is not here: {_no_mps()}", allowed=", ".join(devices()))
        return Choice(subject="device", value="mps", reason="asked for")
    match = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if match is None:
        raise InvalidInputError(
            f"unknown device {wanted!r}: use auto, cpu, mps, cuda or cuda:N",
            allowed="auto, cpu, mps, cuda, cuda:N",
        )
    if not torch.cuda.is_available():
        raise InvalidInputError(f"device {wanted!r} is not here: {_no_cuda()}", allowed=", ".join(devices()))
    index = int(match.group(1) or 0)
    if index >= torch.cuda.device_count():
        raise InvalidInputError(
            f"device {wanted!r} is not here: there are {torch.cuda.device_count()}, counted from 0",
            allowed=", ".join(devices()),
        )
    return Choice(subject="device", value=f"cuda:{index}", reason=f"asked for: {_cuda_name(index)}")


def choose_proven_device(wanted: str, home: Path | None) -> tuple[Choice, Proofs]:
    """The device, and what `cliptune doctor` proved of it: one that computes wrongly is not taken.

    Raises:
        InvalidInputError: as `choose_device`; or the device asked for by name was found to compute wrongly.
    """
    device = choose_device(wanted)
    if home is None:
        return device, UNKNOWN
    proofs = load_proofs(home, device.value, detect(device.value))
    safe = rules.choose_device_by_proofs(device, proofs)
    if safe.value != device.value:
        proofs = load_proofs(home, safe.value, detect(safe.value))
    return safe, proofs


def devices() -> list[str]:
    """Every device of this machine that torch can use."""
    found = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def choose_precision(wanted: str, device: str) -> Choice:
    """ "auto", "fp32", "bf16" or "fp16" for training on `device`, whatever the workload.

    Raises:
        InvalidInputError: not such a name, or the device cannot do it.
    """
    return rules.choose_precision(wanted, detect(device))


def choose_threads(wanted: int | None) -> Choice:
    """CPU threads of a process: `wanted`, or the fast cores that it may use.

    Raises:
        InvalidInputError: `wanted` is not positive.
    """
    return rules.choose_threads(wanted, host())


def device_memory_bytes(device: str) -> int:
    """Bytes that this process holds on `device`: the allocator's on a GPU, the resident set on the CPU.

    macOS tells a process only its largest resident set so far.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.memory_reserved(device)
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def memory_limit_bytes(device: str) -> int:
    """Bytes that this process may come to hold on `device`, whatever others hold now."""
    kind = torch.device(device).type
    machine = detect(device)
    if kind == "cuda":
        fraction = torch.cuda.get_per_process_memory_fraction(device)
        return int(machine.gpu_memory_bytes * fraction)
    return machine.gpu_memory_bytes if kind == "mps" else machine.memory_bytes


def free_memory_bytes(device: str) -> int:
    """Bytes that this process can still take on `device`, beside what it holds and what others hold.

    What torch's allocator keeps for reuse counts as free.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        within_limit = memory_limit_bytes(device) - torch.cuda.memory_reserved(device)
        return max(0, min(torch.cuda.mem_get_info(device)[0], within_limit) + reusable)
    if kind == "mps":
        held = torch.mps.current_allocated_memory()
        return room_beside_others(torch.mps.recommended_max_memory() - held, available_bytes())
    return available_bytes()


def room_beside_others(room_bytes: int, available_bytes: int) -> int:
    """What a process of a Mac can take, which has so much room by Metal while the RAM has so much available.

    At least half of the room: what others hold idle is compressed.
    """
    room_bytes = max(0, room_bytes)
    return min(room_bytes, max(available_bytes, room_bytes // 2))


def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "torch finds no CUDA GPU or driver"


def _no_mps() -> str:
    return why_no_mps(host(), built=torch.backends.mps.is_built())


def why_no_mps(machine: Machine, *, built: bool) -> str:
    """Why Apple's GPU cannot be used, for a person. `built`: this torch knows of it."""
    if machine.system != "Darwin":
        return "mps needs macOS on Apple silicon"
    if machine.rosetta:
        return "this is an Intel build of Python, which runs under Rosetta: install an arm64 one"
    if not built:
        return "this torch was built without MPS"
    return f"macOS {machine.os_version} offers no Metal device (it may be too old, or a virtual machine)"
