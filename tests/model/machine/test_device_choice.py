"""Devices, precision and threads: what is chosen, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cliptune.errors import InvalidInputError
from cliptune_model.choice import Choice
from cliptune_model.machine.device import (
    choose_device,
    choose_precision,
    choose_proven_device,
    choose_threads,
    device_memory_bytes,
    devices,
    why_no_mps,
)
from cliptune_model.machine.hardware import Machine, detect
from cliptune_model.machine.proofs import UNKNOWN, Proof, Proofs, save_proofs
from cliptune_model.machine.rules import choose_serving_attention
from cliptune_model.machine.synchronize import synchronize

ACCELERATED = torch.cuda.is_available() or torch.backends.mps.is_available()


def test_auto_takes_the_first_device_there_is_and_says_why() -> None:
    choice = choose_device("auto")
    assert choice.value == devices()[0]
    assert choice.subject == "device"
    assert len(choice.reason) > 10


@pytest.mark.skipif(ACCELERATED, reason="a GPU is here")
def test_auto_without_a_gpu_is_the_cpu_with_the_reason() -> None:
    choice = choose_device("auto")
    assert choice.value == "cpu"
    assert "no GPU" in choice.reason


def test_an_absent_device_is_refused_with_what_there_is() -> None:
    for wanted in ("cuda:99", "mps" if not torch.backends.mps.is_available() else "cuda"):
        with pytest.raises(InvalidInputError, match="is not here") as caught:
            choose_device(wanted)
        assert "cpu" in caught.value.metadata["allowed"]


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:", "cuda:-1", "CPU", "cuda:x"])
def test_what_is_no_device_is_refused(wanted: str) -> None:
    with pytest.raises(InvalidInputError, match="unknown device"):
        choose_device(wanted)


def test_precision_on_the_cpu_is_exact_unless_asked_otherwise() -> None:
    assert choose_precision("auto", "cpu").value == "fp32"
    assert choose_precision("bf16", "cpu").value == "bf16"
    assert "asked for" in choose_precision("bf16", "cpu").reason
    with pytest.raises(InvalidInputError, match="unknown precision 'int8'"):
        choose_precision("int8", "cpu")


def test_threads_are_the_usable_cores_unless_asked_otherwise() -> None:
    assert int(choose_threads(None).value) >= 1
    assert choose_threads(3) == Choice(subject="threads", value="3", reason="asked for")
    with pytest.raises(InvalidInputError, match="threads = 0"):
        choose_threads(0)


def test_memory_of_the_cpu_grows_with_what_is_held() -> None:
    before = device_memory_bytes("cpu")
    held = torch.ones(64 * 2**20 // 4)
    assert device_memory_bytes("cpu") - before > 48 * 2**20
    assert held.numel()
    synchronize("cpu")


def test_a_device_is_taken_together_with_what_doctor_proved_of_it(tmp_path: Path) -> None:
    assert choose_proven_device("cpu", None) == (choose_device("cpu"), UNKNOWN)
    assert choose_proven_device("cpu", tmp_path) == (choose_device("cpu"), UNKNOWN)
    found = Proofs(found={"sdpa attention": Proof(holds=False, told="relative difference 0.4")})
    save_proofs(tmp_path, "cpu", detect("cpu"), found)
    assert choose_proven_device("cpu", tmp_path)[1] == found
    served = choose_serving_attention(found)
    assert served.value == "sliced"
    assert "0.4" in served.reason
    assert choose_serving_attention().value == "sdpa"


def test_why_there_is_no_mps_is_told_with_the_remedy() -> None:
    mac = Machine(system="Darwin", os_version="12.1", chip="Apple M1", generation=1)
    assert "macOS" in why_no_mps(Machine(system="Linux"), built=False)
    assert "arm64" in why_no_mps(replace(mac, rosetta=True), built=True)
    assert "without MPS" in why_no_mps(mac, built=False)
    assert "12.1" in why_no_mps(mac, built=True)
