"""What a machine is: from what its system tells, here and on machines that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cliptune_model.machine.container import container_limits
from cliptune_model.machine.device import free_memory_bytes, memory_limit_bytes, room_beside_others
from cliptune_model.machine.hardware import (
    APPLE,
    GIB,
    Machine,
    apple_chip,
    apple_host,
    available_bytes,
    cpu_bf16,
    detect,
    host,
    parse_sysctl,
    parse_vm_stat,
    recommended_bytes,
    timed_tflops,
    with_apple_gpu,
)

M2_PRO = """\
machdep.cpu.brand_string: Apple M2 Pro
hw.memsize: 17179869184
hw.physicalcpu: 10
hw.perflevel0.physicalcpu: 6
kern.osproductversion: 15.1.1
"""
ROSETTA = """\
machdep.cpu.brand_string: VirtualApple @ 2.50GHz
hw.memsize: 8589934592
hw.physicalcpu: 8
kern.osproductversion: 14.5
sysctl.proc_translated: 1
"""


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("Apple M1", (1, "")),
        ("Apple M1 Ultra", (1, "Ultra")),
        ("Apple M2 Pro", (2, "Pro")),
        ("Apple M3 Max", (3, "Max")),
        ("Apple M4", (4, "")),
        ("Apple M10 Max", (10, "Max")),
        ("Intel(R) Core(TM) i9-9880H CPU @ 2.30GHz", (0, "")),
        ("VirtualApple @ 2.50GHz", (0, "")),
        ("", (0, "")),
    ],
)
def test_a_chip_is_read_from_its_name(name: str, chip: tuple[int, str]) -> None:
    assert apple_chip(name) == chip


def test_a_mac_is_read_from_its_sysctl() -> None:
    machine = apple_host(parse_sysctl(M2_PRO))
    assert machine == Machine(
        system="Darwin",
        os_version="15.1.1",
        architecture="arm64",
        chip="Apple M2 Pro",
        generation=2,
        variant="Pro",
        memory_bytes=16 * GIB,
        cores=10,
        performance_cores=6,
    )
    assert machine.macos == 15
    assert machine.in_table
    assert not machine.rosetta


def test_an_intel_python_under_rosetta_is_recognised() -> None:
    machine = apple_host(parse_sysctl(ROSETTA), architecture="x86_64")
    assert machine.rosetta
    assert machine.generation == 0
    assert machine.performance_cores == machine.cores == 8
    without_the_flag = ROSETTA.replace("sysctl.proc_translated: 1\n", "")
    assert apple_host(parse_sysctl(without_the_flag)).rosetta


def test_a_sysctl_that_says_nothing_gives_a_machine_all_the_same() -> None:
    machine = apple_host(parse_sysctl("sysctl: unknown oid\n"))
    assert machine.cores >= 1
    assert machine.memory_bytes == 0
    assert machine.generation == 0


@pytest.mark.parametrize(("generation", "variant"), sorted(APPLE))
def test_every_chip_of_the_table_gets_its_gpu(generation: int, variant: str) -> None:
    name = f"Apple M{generation} {variant}".strip()
    mac = Machine(
        system="Darwin", chip=name, generation=generation, variant=variant, memory_bytes=32 * GIB, cores=8
    )
    whole = with_apple_gpu(mac, cores=0, recommended=0)
    gpu = APPLE[generation, variant]
    assert (whole.gpu_cores, whole.gpu_tflops, whole.gpu_gb_per_s) == (gpu.cores, gpu.tflops, gpu.gb_per_s)
    # cores × 128 lanes × 2 × clock: the clock of every known chip is between 1.2 and 1.8 GHz.
    assert 1.2 < gpu.tflops * 1e12 / (gpu.cores * 128 * 2) / 1e9 < 1.8
    fewer = with_apple_gpu(mac, cores=gpu.cores - 1, recommended=20 * GIB)
    assert fewer.gpu_tflops == pytest.approx(gpu.tflops * (gpu.cores - 1) / gpu.cores, abs=0.01)
    assert fewer.gpu_memory_bytes == 20 * GIB
    assert whole.accelerator == "mps"
    assert whole.gpu_bf16 == (generation >= 3)


def test_a_chip_newer_than_the_table_is_sized_by_what_was_measured() -> None:
    mac = Machine(system="Darwin", chip="Apple M7 Max", generation=7, variant="Max", memory_bytes=64 * GIB)
    assert not mac.in_table
    sized = with_apple_gpu(mac, cores=48, recommended=0, measured_tflops=31.254)
    assert (sized.gpu_tflops, sized.gpu_cores, sized.gpu_gb_per_s) == (31.25, 48, 0.0)
    assert sized.gpu_bf16


def test_the_timed_matmul_gives_a_rate() -> None:
    before = torch.get_num_threads()
    rate = timed_tflops("cpu")
    assert 1e-4 < rate < 100
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("ram_gib", "least", "most"), [(8, 5.0, 5.6), (16, 10.0, 11.5), (48, 36.0, 38.0)])
def test_metals_recommendation_is_guessed_where_it_is_not_told(
    ram_gib: int, least: float, most: float
) -> None:
    assert least * GIB < recommended_bytes(ram_gib * GIB) < most * GIB


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512_vnni\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("", False),
    ],
)
def test_bf16_of_a_processor_is_read_from_its_flags(cpuinfo: str, has: bool) -> None:
    assert cpu_bf16(cpuinfo) is has


def test_this_machine_is_detected() -> None:
    machine = host()
    assert machine.system in ("Linux", "Darwin")
    assert machine.memory_bytes > 2**28
    assert 1 <= machine.performance_cores <= machine.cores
    assert machine.torch >= (2, 11)
    assert machine.chip
    assert detect("cpu") == machine
    assert detect("cpu").accelerator == "cpu"
    assert 0 < available_bytes() <= machine.memory_bytes
    assert 0 < free_memory_bytes("cpu") <= memory_limit_bytes("cpu") == machine.memory_bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_gpu_is_detected() -> None:
    machine = detect("cuda:0")
    assert machine.accelerator == "cuda"
    assert machine.gpu_name
    assert machine.gpu_memory_bytes > 2**30
    assert 0 < free_memory_bytes("cuda:0") <= memory_limit_bytes("cuda:0") <= machine.gpu_memory_bytes


VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                         90000.
Pages purgeable:                           1000.
"""


def test_what_a_mac_has_available_is_read_from_vm_stat_and_bounds_its_gpu() -> None:
    assert parse_vm_stat(VM_STAT) == 34_000 * 16_384
    assert parse_vm_stat("") == 0
    assert room_beside_others(10 * GIB, 20 * GIB) == 10 * GIB
    assert room_beside_others(10 * GIB, 7 * GIB) == 7 * GIB
    assert room_beside_others(10 * GIB, 1 * GIB) == 5 * GIB
    assert room_beside_others(-GIB, 5 * GIB) == 0


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_no_control_groups_no_limits(tmp_path: Path) -> None:
    limits = container_limits(tmp_path / "none", "0::/\n")
    assert limits.memory_bytes is limits.cores is None
    assert limits.free_bytes(default=7) == 7


def test_the_lowest_limit_of_all_parents_counts(tmp_path: Path) -> None:
    write(tmp_path, memory__max="max\n", cpu__max="max 100000\n")
    write(tmp_path / "slice", memory__max=f"{4 * GIB}\n", cpu__max="350000 100000\n")
    write(tmp_path / "slice" / "job", memory__max=f"{6 * GIB}\n", cpu__max="max 100000\n")
    limits = container_limits(tmp_path, "0::/slice/job\n")
    assert limits.memory_bytes == 4 * GIB
    assert limits.cores == 3


def test_inside_a_container_the_hosts_path_is_not_there_and_the_root_counts(tmp_path: Path) -> None:
    write(tmp_path, memory__max=f"{2 * GIB}\n", cpu__max="50000 100000\n")
    limits = container_limits(tmp_path, "0::/docker/0123abcd\n")
    assert limits.memory_bytes == 2 * GIB
    assert limits.cores == 1  # half a core is one


def test_version_1_of_control_groups_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "memory" / "job", memory__limit_in_bytes=f"{3 * GIB}\n")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712\n")  # no limit
    write(tmp_path / "cpu" / "job", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    limits = container_limits(tmp_path, "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    assert limits.memory_bytes == 3 * GIB
    assert limits.cores == 2


def test_pages_that_the_kernel_can_drop_count_as_free(tmp_path: Path) -> None:
    write(tmp_path, memory__max=f"{4 * GIB}", memory__current=f"{3 * GIB}")
    limits = container_limits(tmp_path, "0::/")
    assert limits.free_bytes(default=100 * GIB) == GIB
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert limits.free_bytes(default=100 * GIB) == 2 * GIB
    assert limits.free_bytes(default=GIB // 2) == GIB // 2
