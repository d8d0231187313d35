"""What `cliptune doctor` looks at: the machine, what is installed, what was chosen and why, and proofs.

Enters: a home, a device. Leaves: `Check`s for `cliptune_model.cli` to print. Nothing here fails with an
exception: what is broken becomes a failed check. torch and open_clip are imported inside, because a torch
that cannot be imported is one of the things to be told.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

import grpc

from cliptune.errors import CliptuneError

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

# Relative differences. Right fp32 arithmetic stays below 1e-4; wrong gradients are far above.
FINE_DIFFERENCE: Final = 1e-3
WRONG_DIFFERENCE: Final = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    status: Status
    reason: str
    seconds: float = 0.0


Answer = tuple[Status, str]


def diagnose(home: Path, wanted_device: str = "auto") -> Iterator[Check]:
    """Every check in order, each yielded as soon as it is done."""
    yield _check("python", _python)
    yield _check("platform", _platform)
    yield _check("memory", _memory)
    yield _check("packages", _packages)
    yield _check("home", lambda: _home(home))
    yield _check("daemon", lambda: _daemon(home))
    imports = _check("imports", _imports)
    yield imports
    if imports.status == "fail":
        return
    from cliptune_model import device as devices
    from cliptune_model.hardware import host

    yield _check("devices", lambda: ("ok", f"{', '.join(devices.devices())} on {host().chip}"))
    chosen: list[str] = []

    def choose() -> Answer:
        choice = devices.choose_device(wanted_device)
        chosen.append(choice.value)
        return "ok", f"{choice.value}: {choice.reason}"

    yield _check("device", choose)
    if not chosen:
        return
    yield _check("precision", lambda: _told(devices.choose_precision("auto", chosen[0])))
    yield _check("threads", lambda: _told(devices.choose_threads(None)))
    yield from _proofs(chosen[0])


def _proofs(device: str) -> Iterator[Check]:
    from cliptune_model import proving as proofs
    from cliptune_model.pixels import FORMATS

    def gradients() -> Answer:
        what = f"forward and backward in fp32 on {device} against float64 on the CPU"
        return _judged(proofs.gradient_difference(device), what)

    def long_sums() -> Answer:
        status, reason = _judged(
            proofs.long_sum_difference(device), f"a sum over {proofs.LONG_ROWS:,} rows on {device}"
        )
        if status == "ok":
            return status, reason
        return status, f"{reason}; keep batch size × tokens below 32,767 (a newer torch may be free of this)"

    def export() -> Answer:
        difference = proofs.export_difference(device)
        return (
            "ok" if difference == 0 else "fail",
            f"exported and loaded again; vectors differ by {difference:g}",
        )

    def tokeniser() -> Answer:
        tokens = proofs.tokens_of_a_cat()
        return "ok" if tokens == proofs.CAT_TOKENS else "fail", f"{proofs.PROBE_TEXTS[0]!r} is {list(tokens)}"

    def images() -> Answer:
        good = proofs.decodable_formats()
        missing = [kind for kind in FORMATS if kind not in good]
        if missing:
            return "fail", f"this Pillow does not read {', '.join(missing)}"
        return "ok", f"{', '.join(good)} are read, truncated ones refused"

    yield _check("gradients", gradients)
    yield _check("long sums", long_sums)
    yield _check("export", export)
    yield _check("tokeniser", tokeniser)
    yield _check("images", images)


def _check(name: str, look: Callable[[], Answer]) -> Check:
    started = time.perf_counter()
    try:
        status, reason = look()
    except CliptuneError as error:
        status, reason = "fail", error.message
    except Exception as error:  # a diagnosis reports what is broken, whatever it is
        status, reason = "fail", f"{type(error).__name__}: {error}"
    return Check(name=name, status=status, reason=reason, seconds=round(time.perf_counter() - started, 3))


def _told(choice: object) -> Answer:
    return "ok", f"{getattr(choice, 'value', '')}: {getattr(choice, 'reason', '')}"


def _judged(difference: float, what: str) -> Answer:
    told = f"{what}: relative difference {difference:.1e}"
    if math.isnan(difference) or difference > WRONG_DIFFERENCE:
        return "fail", f"{told}, which is wrong"
    return "ok" if difference <= FINE_DIFFERENCE else "warn", told


def _python() -> Answer:
    told = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return "ok", told
    return "warn", f"{told}; cliptune is tested with 3.11 to 3.13"


def _platform() -> Answer:
    told = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if platform.system() not in ("Linux", "Darwin"):
        return "warn", f"{told}; cliptune is made for Linux and macOS"
    if platform.system() == "Darwin" and platform.machine() == "x86_64":
        return "warn", f"{told}; on Apple silicon this is an Intel Python under Rosetta: install an arm64 one"
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
