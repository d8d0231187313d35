"""Builds the fake device's library, once for each torch, and runs programs that use it.

Enters: the name of a module to run. Leaves: what it printed, as JSON. Called by tests. The library has to be
loaded before torch, hence a process of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("guard.cpp")
ENVIRONMENT = "CLIPTUNE_FAKE_MPS"
_ROOT = Path(__file__).parents[3]


def library() -> Path:
    """The library, from the cache or built now. Skips the test where there is nothing to build it with."""
    if platform.system() != "Linux":
        pytest.skip(f"the fake MPS device is for Linux; this is {platform.system()}")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("the fake MPS device needs a C++ compiler: g++ or clang++")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    if not (torch / "include" / "ATen").is_dir():
        pytest.skip("this build of torch comes without its C++ headers")
    key = hashlib.sha256(SOURCE.read_bytes() + metadata.version("torch").encode() + str(torch).encode())
    folder = Path(tempfile.gettempdir()) / f"cliptune-fake-mps-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder / f"{key.hexdigest()[:16]}.so"
    if not found.exists():
        half = found.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(half)]
        command += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-2000:]
        half.replace(found)
    return found


def run_on_fake_mps(module: str, *arguments: str) -> Any:
    """Runs a module that imports `tests.support.fake_mps.device` first; returns its last line as JSON."""
    environment = {**os.environ, ENVIRONMENT: str(library()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=environment,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
