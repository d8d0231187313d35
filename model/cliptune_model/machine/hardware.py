"""What is here: system, chip, cores, memory, GPU.

Enters: nothing, or the device that will compute. Leaves: a `Machine`, a plain value that `policy` decides
from; so every machine can be tried on any other. Called by trainer, engine and `cliptune doctor`. `host`
needs no torch and may be asked before it is imported; `detect` adds what torch knows of the device.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

from cliptune_model.machine.container import container_limits, number_of, text_of

GIB: Final = 2**30


class AppleGpu(NamedTuple):
    """The largest GPU of a chip: smaller ones of the same name scale by their cores."""

    cores: int
    gb_per_s: float
    tflops: float  # fp32


# By generation and variant. Vendor's figures; TFLOPs = cores × 128 lanes × 2 × clock.
APPLE: Final[Mapping[tuple[int, str], AppleGpu]] = {
    (1, ""): AppleGpu(8, 68, 2.6),
    (1, "Pro"): AppleGpu(16, 200, 5.2),
    (1, "Max"): AppleGpu(32, 400, 10.4),
    (1, "Ultra"): AppleGpu(64, 800, 21.0),
    (2, ""): AppleGpu(10, 100, 3.6),
    (2, "Pro"): AppleGpu(19, 200, 6.8),
    (2, "Max"): AppleGpu(38, 400, 13.6),
    (2, "Ultra"): AppleGpu(76, 800, 27.0),
    (3, ""): AppleGpu(10, 100, 3.6),
    (3, "Pro"): AppleGpu(18, 150, 6.4),
    (3, "Max"): AppleGpu(40, 400, 14.3),
    (3, "Ultra"): AppleGpu(80, 819, 28.0),
    (4, ""): AppleGpu(10, 120, 4.3),
    (4, "Pro"): AppleGpu(20, 273, 8.6),
    (4, "Max"): AppleGpu(40, 546, 17.2),
}
NEWEST_GENERATION: Final = max(generation for generation, _ in APPLE)

# Unknown names are told on stderr; the others are answered all the same.
_SYSCTL_NAMES: Final = (
    "machdep.cpu.brand_string",
    "hw.memsize",
    "hw.physicalcpu",
    "hw.perflevel0.physicalcpu",
    "kern.osproductversion",
    "sysctl.proc_translated",
)
_MATMUL_SIDE: Final = 1024
_MATMUL_TIME_S: Final = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine and the device of it that computes. Zero or empty: unknown, or none.

    Attributes:
        system: "Darwin", "Linux", ...
        os_version: macOS's ("15.1"), or the kernel's.
        architecture: what Python runs as: "arm64", "x86_64", ...
        chip: as the system names it: "Apple M2 Pro".
        generation: Apple's: 1 for M1, 2 for M2, ...; 0: not one of Apple's.
        variant: "", "Pro", "Max" or "Ultra".
        memory_bytes: RAM, or the container's limit where that is less.
        cores: that this process may use.
        performance_cores: Apple's fast ones; elsewhere as `cores`.
        cpu_bf16: the processor has bf16 instructions; without them torch emulates the type, slowly.
        container: a limit of the container lies below the machine's own.
        rosetta: an Intel Python on Apple silicon.
        torch_version: "2.15.0".
        c_compiler, cpp_compiler: the ones that torch.compile would call, for CUDA and for the CPU.
        triton: torch.compile can write CUDA kernels.
        accelerator: "cpu", "mps" or "cuda".
        gpu_name: as torch names it.
        gpu_cores: Apple's GPU cores; CUDA's multiprocessors.
        gpu_memory_bytes: CUDA: the GPU's. MPS: what Metal recommends to use of the RAM.
        gpu_tflops: fp32, from the table; measured for a chip that is not in it.
        gpu_gb_per_s: memory bandwidth, from the table.
        gpu_bf16: the GPU computes bf16 itself, rather than emulating it.
    """

    system: str
    os_version: str = ""
    architecture: str = ""
    chip: str = ""
    generation: int = 0
    variant: str = ""
    memory_bytes: int = 0
    cores: int = 1
    performance_cores: int = 1
    cpu_bf16: bool = False
    container: bool = False
    rosetta: bool = False
    torch_version: str = ""
    c_compiler: str = ""
    cpp_compiler: str = ""
    triton: bool = False
    accelerator: str = "cpu"
    gpu_name: str = ""
    gpu_cores: int = 0
    gpu_memory_bytes: int = 0
    gpu_tflops: float = 0.0
    gpu_gb_per_s: float = 0.0
    gpu_bf16: bool = False

    @property
    def macos(self) -> int:
        """macOS's major version; 0 elsewhere."""
        major = self.os_version.partition(".")[0]
        return int(major) if self.system == "Darwin" and major.isdigit() else 0

    @property
    def torch(self) -> tuple[int, int]:
        """(2, 15); (0, 0) when torch is not there."""
        match = re.match(r"(\d+)\.(\d+)", self.torch_version)
        return (int(match.group(1)), int(match.group(2))) if match else (0, 0)

    @property
    def in_table(self) -> bool:
        """The chip is one of the Apple chips known here."""
        return (self.generation, self.variant) in APPLE


@cache
def host() -> Machine:
    """The machine without its GPU. Needs no torch."""
    if platform.system() == "Darwin":
        machine = apple_host(
            parse_sysctl(_output("/usr/sbin/sysctl", *_SYSCTL_NAMES)), architecture=platform.machine()
        )
    else:
        machine = _other_host()
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = ""
    return replace(
        machine,
        torch_version=torch_version,
        c_compiler=_compiler(os.environ.get("CC", ""), "cc", "gcc", "clang"),
        cpp_compiler=_compiler(os.environ.get("CXX", ""), "c++", "g++", "clang++"),
        triton=find_spec("triton") is not None,
    )


@cache
def detect(device: str) -> Machine:
    """The machine with the device that computes: "cpu", "mps", "cuda" or "cuda:N", which must be there."""
    machine = host()
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return _with_cuda(machine, int(index or 0))
    if kind == "mps":
        return _with_mps(machine)
    return machine


def recommended_bytes(memory_bytes: int) -> int:
    """What Metal recommends to use of so much RAM: about two thirds of a small one, more of a large one."""
    share = 2 / 3 if memory_bytes <= 24 * GIB else 0.75 if memory_bytes < 48 * GIB else 0.78
    return int(memory_bytes * share)


def available_bytes() -> int:
    """RAM that this process could still take without swapping, within its container's limit."""
    if platform.system() == "Darwin":
        return parse_vm_stat(_output("/usr/bin/vm_stat")) or host().memory_bytes // 2
    told = re.search(r"^MemAvailable:\s*(\d+) kB", text_of(Path("/proc/meminfo")), re.MULTILINE)
    available = int(told.group(1)) * 1024 if told else host().memory_bytes // 2
    return container_limits().free_bytes(default=available)


def parse_vm_stat(told: str) -> int:
    """Bytes of macOS's vm_stat that are free, or given back when asked for; 0: it says nothing."""
    size = re.search(r"page size of (\d+) bytes", told)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s*(\d+)", told, re.MULTILINE)
    return int(size.group(1)) * sum(map(int, pages)) if size else 0


def parse_sysctl(told: str) -> dict[str, str]:
    """ "name: value" lines of macOS's sysctl."""
    return {
        name.strip(): value.strip()
        for name, colon, value in (line.partition(":") for line in told.splitlines())
        if colon
    }


def apple_host(told: Mapping[str, str], *, architecture: str = "arm64") -> Machine:
    """A Mac, from its sysctl values."""
    chip = told.get("machdep.cpu.brand_string", "")
    # Under Rosetta the processor calls itself "VirtualApple @ 2.50GHz".
    rosetta = told.get("sysctl.proc_translated") == "1" or chip.startswith("VirtualApple")
    generation, variant = apple_chip(chip)
    cores = number_of(told.get("hw.physicalcpu")) or os.cpu_count() or 1
    return Machine(
        system="Darwin",
        os_version=told.get("kern.osproductversion", "") or platform.mac_ver()[0],
        architecture=architecture,
        chip=chip,
        generation=generation,
        variant=variant,
        memory_bytes=number_of(told.get("hw.memsize")),
        cores=cores,
        performance_cores=number_of(told.get("hw.perflevel0.physicalcpu")) or cores,
        rosetta=rosetta,
    )


def apple_chip(name: str) -> tuple[int, str]:
    """ "Apple M2 Pro" → (2, "Pro"); (0, "") for anything else."""
    match = re.match(r"Apple M(\d+)(?:\s+(Pro|Max|Ultra))?", name)
    return (int(match.group(1)), match.group(2) or "") if match else (0, "")


def with_apple_gpu(
    machine: Machine, *, cores: int, recommended: int, measured_tflops: float = 0.0
) -> Machine:
    """A Mac with its GPU: from the table, its cores counted; a chip outside it from a measured rate.

    Args:
        machine: from `apple_host`.
        cores: of the GPU; 0: unknown.
        recommended: bytes, by Metal; 0: unknown.
        measured_tflops: fp32, of a timed matmul, for a chip that the table lacks.
    """
    known = APPLE.get((machine.generation, machine.variant))
    if known is not None:
        share = cores / known.cores if 0 < cores < known.cores else 1.0
        cores, tflops, gb_per_s = cores or known.cores, known.tflops * share, known.gb_per_s
    else:
        tflops, gb_per_s = measured_tflops, 0.0
    return replace(
        machine,
        accelerator="mps",
        gpu_name=machine.chip,
        gpu_cores=cores,
        gpu_memory_bytes=recommended or recommended_bytes(machine.memory_bytes),
        gpu_tflops=round(tflops, 2),
        gpu_gb_per_s=gb_per_s,
        # M1 and M2 emulate it; a newer chip than the table is taken as the newest known.
        gpu_bf16=machine.generation not in (1, 2),
    )


def timed_tflops(device: str) -> float:
    """fp32 TFLOP/s of a square matmul that is repeated for a fifth of a second."""
    import torch

    from cliptune_model.machine.synchronize import synchronize

    a_NN = torch.randn(_MATMUL_SIDE, _MATMUL_SIDE, device=device)
    for _ in range(3):  # compiles kernels and wakes the clock
        a_NN @ a_NN
    synchronize(device)
    done, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < _MATMUL_TIME_S:
        for _ in range(4):
            a_NN @ a_NN
        synchronize(device)
        done += 4
    return 2 * _MATMUL_SIDE**3 * done / elapsed_s / 1e12


def cpu_bf16(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo names bf16 instructions: x86's AVX-512 or AMX, or Arm's."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.group(1).split())


def _other_host() -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = container_limits()
    usable_bytes = min(memory_bytes, limits.memory_bytes or memory_bytes)
    usable_cores = min(cores, limits.cores or cores)
    told = text_of(Path("/proc/cpuinfo"))
    match = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return Machine(
        system=platform.system(),
        os_version=platform.release(),
        architecture=platform.machine(),
        chip=match.group(1).strip() if match else platform.processor() or platform.machine(),
        memory_bytes=usable_bytes,
        cores=usable_cores,
        performance_cores=usable_cores,
        cpu_bf16=cpu_bf16(told),
        container=usable_bytes < memory_bytes or usable_cores < cores,
    )


def _with_cuda(machine: Machine, index: int) -> Machine:
    import torch

    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(
        machine,
        accelerator="cuda",
        gpu_name=properties.name,
        gpu_cores=properties.multi_processor_count,
        gpu_memory_bytes=properties.total_memory,
        gpu_bf16=bf16,
    )


def _with_mps(machine: Machine) -> Machine:
    import torch

    counted = getattr(torch.backends.mps, "get_core_count", None)
    return with_apple_gpu(
        machine,
        cores=int(counted()) if counted else 0,
        recommended=int(torch.mps.recommended_max_memory()),
        measured_tflops=0.0 if machine.in_table else timed_tflops("mps"),
    )


def _output(*command: str) -> str:
    """What a program of the system prints; empty when it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _compiler(*names: str) -> str:
    for name in names:
        if name and (found := shutil.which(name)):
            return found
    return ""
