"""What `cliptune doctor` looks at: the machine, what is installed, proofs, and what is chosen and why.

Enters: a home, a device. Leaves: `Check`s and `Choice`s for `cliptune_model.cli` to print, and in the home
what was proved. Nothing here fails with an exception: what is broken becomes a failed check. torch and
open_clip are imported inside, because a torch that cannot be imported is one of the things to be told.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

import grpc

from cliptune.errors import CliptuneError
from cliptune_model.choice import Choice
from cliptune_model.machine.hardware import GIB, NEWEST_GENERATION, Machine, detect, host
from cliptune_model.machine.policy import Tower, Wishes, Workload, decide, prepare_process
from cliptune_model.machine.proofs import FILE, UNKNOWN, Proof, Proofs, save_proofs
from cliptune_model.machine.rules import choose_device_by_proofs

Status = Literal["ok", "warn", "fail"]

PACKAGES: Final = (
    "cliptune",
    "torch",
    "torchvision",
    "open_clip_torch",
    "numpy",
    "pillow",
    "safetensors",
    "grpcio",
)
LITTLE_MEMORY_BYTES: Final = 4 * 2**30
LITTLE_DISK_BYTES: Final = 2 * 2**30
DAEMON_TIMEOUT_S: Final = 3.0

# Jobs cannot be trained where these fail; the other proofs only narrow the choices.
_VITAL: Final = ("gradients", "real shapes")
# What the table of choices is made for. A job's own are made for its model, and counted on it.
_BATCH_SIZE: Final = 256
_LAYERS_12: Final = Tower(layers=12, width=768, heads=12)
_EXAMPLES: Final[Mapping[str, Workload]] = {
    "ViT-B/32": Workload(
        image_tokens=50,
        text_tokens=77,
        parameters=151_277_313,
        batch_size=_BATCH_SIZE,
        image=_LAYERS_12,
        text=Tower(layers=12, width=512, heads=8),
    ),
    "ViT-B/16": Workload(
        image_tokens=197,
        text_tokens=77,
        parameters=149_620_737,
        batch_size=_BATCH_SIZE,
        image=_LAYERS_12,
        text=Tower(layers=12, width=512, heads=8),
    ),
    "ViT-L/14": Workload(
        image_tokens=257,
        text_tokens=77,
        parameters=427_616_513,
        batch_size=_BATCH_SIZE,
        image=Tower(layers=24, width=1024, heads=16),
        text=_LAYERS_12,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    status: Status
    reason: str
    seconds: float = 0.0


Answer = tuple[Status, str]


class Diagnosis:
    """One look at this machine. Read `checks` to their end; then `choices` and `machine` are known.

    Args:
        home: where proofs are kept.
        wanted_device: "auto" or a name.
    """

    def __init__(self, home: Path, wanted_device: str = "auto") -> None:
        self._home, self._wanted = home, wanted_device
        self.choices: tuple[Choice, ...] = ()
        self.machine = host()

    def checks(self) -> Iterator[Check]:
        """Every check in order, each yielded as soon as it is done."""
        yield _check("python", _python)
        yield _check("platform", _platform)
        yield _check("memory", _memory)
        yield _check("packages", _packages)
        yield _check("home", lambda: _home(self._home))
        yield _check("daemon", lambda: _daemon(self._home))
        imports = _check("imports", _imports)
        yield imports
        if imports.status == "fail":
            return
        from cliptune_model.machine import device as devices

        yield _check("devices", lambda: ("ok", f"{', '.join(devices.devices())} on {host().chip}"))
        chosen: list[Choice] = []

        def choose() -> Answer:
            # Before anything touches the device: its allocator reads them once.
            prepare_process(self._wanted, host())
            chosen.append(devices.choose_device(self._wanted))
            return "ok", f"{chosen[0].value}: {chosen[0].reason}"

        yield _check("device", choose)
        if not chosen:
            return

        def look() -> Answer:
            self.machine = detect(chosen[0].value)
            return _machine(self.machine)

        machine = _check("machine", look)
        yield machine
        if machine.status != "fail":
            yield from self._prove(chosen[0], self.machine)
        yield from _whole_models(chosen[0].value)

    def _prove(self, device: Choice, machine: Machine) -> Iterator[Check]:
        from cliptune_model.proving import CONSEQUENCES, prove_all

        found: dict[str, Proof] = {}
        started = time.perf_counter()
        for name, proof in prove_all(device.value):
            found[name] = proof
            consequence = f", so {CONSEQUENCES[name]}" if name in CONSEQUENCES else ""
            status: Status = "ok" if proof.holds else "fail" if name in _VITAL or not consequence else "warn"
            now = time.perf_counter()
            yield Check(
                name=name,
                status=status,
                reason=proof.told if proof.holds else f"{proof.told}: wrong{consequence}",
                seconds=round(now - started, 3),
            )
            started = now
        proofs = Proofs(found=found)
        yield _check("proofs", lambda: _kept(self._home, device.value, machine, proofs))
        yield _check("choices", lambda: self._choose(device, machine, proofs))

    def _choose(self, device: Choice, machine: Machine, proofs: Proofs) -> Answer:
        safe = choose_device_by_proofs(device, proofs)
        if safe.value != device.value:
            machine, proofs = detect(safe.value), UNKNOWN
        policies = {
            name: decide(machine, safe, Wishes(), workload, proofs) for name, workload in _EXAMPLES.items()
        }
        general, *_ = policies.values()
        self.choices = (
            *(choice for choice in general.choices if choice.subject not in _OF_THE_MODEL),
            *(
                replace(choice, subject=f"{name} {choice.subject}")
                for name, policy in policies.items()
                for choice in policy.choices
                if choice.subject in _OF_THE_MODEL
            ),
        )
        return "ok", f"{len(self.choices)} made, with reasons; model by model for {_BATCH_SIZE} pairs a batch"


# These depend on the model; the others on the machine alone.
_OF_THE_MODEL: Final = ("precision", "micro_batch_size", "max_micro_batch", "checkpointing", "attention")


def _whole_models(device: str) -> Iterator[Check]:
    from cliptune_model.pixels import FORMATS
    from cliptune_model.proving import model

    def export() -> Answer:
        difference = model.export_difference(device)
        return (
            "ok" if difference == 0 else "fail",
            f"exported and loaded again; vectors differ by {difference:g}",
        )

    def tokeniser() -> Answer:
        tokens = model.tokens_of_a_cat()
        return "ok" if tokens == model.CAT_TOKENS else "fail", f"{model.PROBE_TEXTS[0]!r} is {list(tokens)}"

    def images() -> Answer:
        good = model.decodable_formats()
        missing = [kind for kind in FORMATS if kind not in good]
        if missing:
            return "fail", f"this Pillow does not read {', '.join(missing)}"
        return "ok", f"{', '.join(good)} are read, truncated ones refused"

    yield _check("export", export)
    yield _check("tokeniser", tokeniser)
    yield _check("images", images)


def _machine(machine: Machine) -> Answer:
    told = f"{machine.chip}, {machine.cores} cores, {machine.memory_bytes / GIB:.1f} GiB"
    if machine.container:
        told += " by the container's limits"
    if machine.accelerator != "cpu":
        told += f"; GPU: {machine.gpu_cores} cores, {machine.gpu_memory_bytes / GIB:.1f} GiB"
    if machine.gpu_tflops:
        source = "by table" if machine.in_table else "by a timed matmul"
        told += f", {machine.gpu_tflops:g} TFLOP/s in fp32 {source}"
    if machine.accelerator == "mps" and not machine.in_table:
        return "warn", f"{told}; unknown chip, taken as the newest known (M{NEWEST_GENERATION})"
    return "ok", told


def _kept(home: Path, device: str, machine: Machine, proofs: Proofs) -> Answer:
    try:
        save_proofs(home, device, machine, proofs)
    except OSError as error:
        return "warn", f"cannot be kept in {home}: {error.strerror or error}; jobs will not know them"
    failed = [name for name, proof in proofs.found.items() if not proof.holds]
    told = f"kept in {home / FILE} for jobs and engines"
    return "ok", f"{told}; to be avoided: {', '.join(failed)}" if failed else told


def _check(name: str, look: Callable[[], Answer]) -> Check:
    started = time.perf_counter()
    try:
        status, reason = look()
    except CliptuneError as error:
        status, reason = "fail", error.message
    except Exception as error:  # a diagnosis reports what is broken, whatever it is
        status, reason = "fail", f"{type(error).__name__}: {error}"
    return Check(name=name, status=status, reason=reason, seconds=round(time.perf_counter() - started, 3))


def _python() -> Answer:
    told = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return "ok", told
    return "warn", f"{told}; cliptune is tested with 3.11 to 3.13"


def _platform() -> Answer:
    told = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if platform.system() not in ("Linux", "Darwin"):
        return "warn", f"{told}; cliptune is made for Linux and macOS"
    if host().rosetta:
        return "fail", f"{told}: an Intel Python under Rosetta cannot use Apple's GPU; install an arm64 one"
    return "ok", told


def _memory() -> Answer:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = f"{total / 2**30:.1f} GiB"
    if total < LITTLE_MEMORY_BYTES:
        return "warn", f"{told}; little for more than small models"
    return "ok", told


def _packages() -> Answer:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return "fail", f"{', '.join(missing)} missing: pip install 'cliptune[server,trainer]'"
    return "ok", ", ".join(found)


def _imports() -> Answer:
    for name in ("torch", "torchvision", "open_clip", "cliptune_model.clip"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a torch beside another build's torchvision fails with RuntimeError
            return "fail", (
                f"import {name} fails ({type(error).__name__}: {error}). torch and torchvision must be "
                "builds of one release; reinstall both: pip install --force-reinstall torch torchvision"
            )
    return "ok", "torch, torchvision and open_clip load together"


def _home(home: Path) -> Answer:
    existing = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    told = str(home) if existing == home else f"{home} (to be made)"
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        return (
            "fail",
            f"{told} cannot be written: {error.strerror or error}; set CLIPTUNE_HOME to another folder",
        )
    told = f"{told}: writable, {free / 2**30:.1f} GiB free"
    if free < LITTLE_DISK_BYTES:
        return "warn", f"{told}, which is little: checkpoints need about three times a model's size"
    return "ok", told


def _daemon(home: Path) -> Answer:
    path = home / "daemon.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        address, process = str(told["grpc"]), int(told["pid"])
    except FileNotFoundError:
        return "ok", "none runs on this home; start one with: cliptune serve"
    except (ValueError, KeyError, TypeError) as error:
        return "warn", f"{path} is damaged ({error!r}); the next daemon writes it anew"
    try:
        serving = _is_serving(address)
    except grpc.RpcError as error:
        if not _lives(process):
            return (
                "warn",
                f"process {process}, which {path.name} names, is gone; start one with: cliptune serve",
            )
        code = error.code() if hasattr(error, "code") else error
        return (
            "fail",
            f"process {process} at {address} does not answer within {DAEMON_TIMEOUT_S:g} s ({code})",
        )
    if serving:
        return "ok", f"process {process} serves at {address}"
    return "warn", f"process {process} at {address} is up but not ready to infer: is a model loaded?"


def _is_serving(address: str) -> bool:
    """grpc.health.v1 by hand, for its stubs come with the server only. Field 1 in the answer: 1, SERVING."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check: Callable[..., object] = channel.unary_unary("/grpc.health.v1.Health/Check")
        return check(b"", timeout=DAEMON_TIMEOUT_S) == b"\x08\x01"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
