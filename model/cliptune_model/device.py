"""Which device, precision and thread count, each with its reason.

Enters: what the user asked for ("auto" or a name). Leaves: a `Choice` that plans, logs and `cliptune doctor`
show. Called by the trainer, the engine and doctor.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from cliptune.errors import InvalidInputError

PRECISIONS: Final = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An automatic or a checked choice: what was decided, the value, and why."""

    subject: str
    value: str
    reason: str


def choose_device(wanted: str) -> Choice:
    """ "auto", "cpu", "mps", "cuda" or "cuda:N" → the device.

    Raises:
        InvalidInputError: not such a name, or the device is absent; the message says why.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return Choice(subject="device", value="cuda:0", reason=f"a GPU is here: {_cuda_name(0)}")
        if torch.backends.mps.is_available():
            return Choice(subject="device", value="mps", reason=f"Apple's GPU is here: {chip_name()}")
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


def devices() -> list[str]:
    """Every device of this machine that torch can use."""
    found = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def choose_precision(wanted: str, device: str) -> Choice:
    """ "auto", "fp32", "bf16" or "fp16" for training on `device` → the precision of the forward pass.

    Weights, loss and normalisation stay in fp32 whatever is chosen.

    Raises:
        InvalidInputError: not such a name, or the device cannot do it.
    """
    kind = torch.device(device).type
    if wanted == "auto":
        value, reason = _automatic_precision(kind, device)
        return Choice(subject="precision", value=value, reason=reason)
    if wanted not in PRECISIONS:
        raise InvalidInputError(
            f"unknown precision {wanted!r}: use auto, {', '.join(PRECISIONS)}",
            allowed=", ".join(("auto", *PRECISIONS)),
        )
    if wanted == "bf16" and kind == "mps" and _macos_major() < 14:
        raise InvalidInputError(
            f"bf16 on mps needs macOS 14; this is macOS {platform.mac_ver()[0]}", allowed="auto, fp32, fp16"
        )
    return Choice(subject="precision", value=wanted, reason="asked for")


def choose_threads(wanted: int | None) -> Choice:
    """CPU threads of a process: `wanted`, or the cores that it may use.

    Raises:
        InvalidInputError: `wanted` is not positive.
    """
    if wanted is not None:
        if wanted < 1:
            raise InvalidInputError(f"threads = {wanted}: at least 1 is needed")
        return Choice(subject="threads", value=str(wanted), reason="asked for")
    cores, reason = _usable_cores()
    return Choice(subject="threads", value=str(cores), reason=reason)


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


def synchronize(device: str) -> None:
    """Wait until the device has done all that was asked of it; nothing to wait for on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


@cache
def chip_name() -> str:
    """The processor, as its system names it: "Apple M2 Pro", "Intel(R) Xeon(R) ..."."""
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def apple_generation() -> int:
    """1 for M1, 2 for M2, ...; 0: not one of Apple's, or named otherwise."""
    match = re.match(r"Apple M(\d+)", chip_name())
    return int(match.group(1)) if match else 0


def _automatic_precision(kind: str, device: str) -> tuple[str, str]:
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes bf16, which needs no loss scaling"
        return "fp16", f"{_cuda_name(torch.device(device).index or 0)} has no bf16; fp16 with loss scaling"
    if kind == "mps":
        if apple_generation() in (1, 2):
            return "fp32", f"{chip_name()} only emulates bf16"
        if _macos_major() < 14:
            return "fp32", f"bf16 on mps needs macOS 14; this is macOS {platform.mac_ver()[0]}"
        return "bf16", f"{chip_name()} computes bf16, which needs no loss scaling"
    return "fp32", "exact, and half precision is rarely faster on a CPU"


def _usable_cores() -> tuple[int, str]:
    if platform.system() == "Darwin":
        fast = _sysctl("hw.perflevel0.physicalcpu")
        if fast.isdigit() and int(fast) > 0:
            return int(fast), "the performance cores; the efficiency cores would slow each step down"
        return os.cpu_count() or 1, "the cores of the machine"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _container_cores()
    if quota is not None and quota < cores:
        return quota, f"the container's share of {cores} cores"
    return cores, "the cores that this process may use"


def _container_cores() -> int | None:
    """Whole cores of a cgroup's quota, at least 1. None: no quota."""
    path = Path("/sys/fs/cgroup/cpu.max")
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _macos_major() -> int:
    major = platform.mac_ver()[0].partition(".")[0]
    return int(major) if major.isdigit() else 0


def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "torch finds no CUDA GPU or driver"


def _no_mps() -> str:
    if platform.system() != "Darwin":
        return "mps needs macOS on Apple silicon"
    if not torch.backends.mps.is_built():
        return "this torch was built without MPS"
    return "macOS offers no Metal device (it may be too old, a virtual machine, or an Intel build of Python)"


@cache
def _sysctl(name: str) -> str:
    """A value of macOS's sysctl; empty when it has none."""
    try:
        answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
