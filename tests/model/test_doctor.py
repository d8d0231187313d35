"""`cliptune doctor`: what it says of this machine, of broken ones, and of the daemon."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cliptune_model.cli import doctor
from cliptune_model.doctor import Check, Diagnosis
from cliptune_model.machine.hardware import detect
from cliptune_model.machine.proofs import FILE, Proof, load_proofs
from cliptune_model.proving import CONSEQUENCES, PROVERS

LOOKED_AT = ["python", "platform", "memory", "packages", "home", "daemon", "imports", "devices", "device",
             "machine"]  # fmt: skip
NAMES = [*LOOKED_AT, *PROVERS, "proofs", "choices", "export", "tokeniser", "images"]


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(arguments))


def daemon_check(home: Path) -> Check:
    return next(check for check in Diagnosis(home).checks() if check.name == "daemon")


def test_on_this_machine_every_proof_holds_and_its_difference_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json", "--device", "cpu", "--home", str(tmp_path / "new")) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is True
    assert list(checks) == NAMES
    assert all(check["status"] in ("ok", "warn") for check in checks.values())
    assert all(checks[name]["status"] == "ok" for name in NAMES[len(LOOKED_AT) :])
    assert "relative difference" in checks["gradients"]["reason"]
    assert torch.__version__.split("+")[0] in checks["packages"]["reason"]
    assert report["machine"]["torch_version"] == torch.__version__.split("+")[0]
    choices = {choice["subject"]: choice for choice in report["choices"]}
    assert choices["threads"]["value"].isdigit()
    assert {"ViT-B/32 precision", "ViT-L/14 micro_batch_size", "ViT-B/16 attention"} <= set(choices)
    assert all(choice["reason"] for choice in choices.values())
    kept = load_proofs(tmp_path / "new", "cpu", detect("cpu"))
    assert set(kept.found) == set(PROVERS)
    assert all(kept.holds(name) for name in PROVERS)


def test_a_failed_check_is_named_and_sets_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--device", "cuda:99", "--home", str(tmp_path)) == 1
    told = capsys.readouterr().out
    assert "failed: device" in told
    assert "is not here" in told


def test_a_home_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checks = {check.name: check for check in Diagnosis(tmp_path / "file" / "home", "no-such-device").checks()}
    assert checks["home"].status == "fail"
    assert "CLIPTUNE_HOME" in checks["home"].reason


def test_the_home_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIPTUNE_HOME", str(tmp_path / "elsewhere"))
    run("--json", "--device", "no-such-device")
    assert str(tmp_path / "elsewhere") in capsys.readouterr().out


@pytest.fixture
def health_servicer() -> Iterator[tuple[health.HealthServicer, int]]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, port
    server.stop(None).wait()


def write_address(home: Path, *, port: int, pid: int) -> None:
    (home / "daemon.json").write_text(json.dumps({"pid": pid, "grpc": f"127.0.0.1:{port}", "http": ""}))


def test_a_daemon_is_asked_for_its_health(
    tmp_path: Path, health_servicer: tuple[health.HealthServicer, int]
) -> None:
    servicer, port = health_servicer
    write_address(tmp_path, port=port, pid=os.getpid())
    check = daemon_check(tmp_path)
    assert check.status == "ok"
    assert f"serves at 127.0.0.1:{port}" in check.reason
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    check = daemon_check(tmp_path)
    assert check.status == "warn"
    assert "not ready" in check.reason


def test_a_daemon_that_is_gone_is_told_from_one_that_does_not_answer(tmp_path: Path) -> None:
    assert daemon_check(tmp_path).status == "ok"  # none: nothing is wrong
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_address(tmp_path, port=9, pid=gone.pid)
    assert daemon_check(tmp_path).status == "warn"
    write_address(tmp_path, port=9, pid=os.getpid())
    check = daemon_check(tmp_path)
    assert check.status == "fail"
    assert "does not answer" in check.reason
    (tmp_path / "daemon.json").write_text("{")
    assert "damaged" in daemon_check(tmp_path).reason


def test_a_failed_proof_is_told_with_what_is_done_instead_kept_and_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A device that sums wrongly, whose fused optimiser and whose own attention are broken.
    for name in PROVERS:
        holds = name not in ("long sums", "fused optimiser", "sdpa attention")
        told = Proof(holds=holds, told=f"{name}: relative difference {0.0 if holds else 0.4:.1e}")
        monkeypatch.setitem(PROVERS, name, lambda device, sizes, told=told: told)  # type: ignore[misc]
    assert run("--json", "--device", "cpu", "--home", str(tmp_path)) == 0  # the machine can be used
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("long sums", "fused optimiser", "sdpa attention"):
        assert checks[name]["status"] == "warn"
        assert CONSEQUENCES[name] in checks[name]["reason"]
    choices = {choice["subject"]: choice for choice in report["choices"]}
    assert choices["longest_sum"]["value"] == "32766"
    assert choices["ViT-B/16 max_micro_batch"]["value"] == "166"
    assert choices["fused_optimizer"]["value"] == "off"
    assert choices["ViT-B/16 attention"]["value"] == "sliced"
    assert "broken by doctor" in choices["ViT-B/16 attention"]["reason"]
    assert load_proofs(tmp_path, "cpu", detect("cpu")).failed("long sums") is not None


def test_wrong_gradients_fail_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PROVERS:
        told = Proof(holds=name != "real shapes", told="relative difference 0.4")
        monkeypatch.setitem(PROVERS, name, lambda device, sizes, told=told: told)  # type: ignore[misc]
    assert run("--device", "cpu", "--home", str(tmp_path)) == 1
    assert "failed: real shapes" in capsys.readouterr().out


def test_proofs_that_cannot_be_kept_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROVERS:
        monkeypatch.setitem(PROVERS, name, lambda device, sizes: Proof(holds=True, told="right"))
    (tmp_path / FILE).mkdir()
    checks = {check.name: check for check in Diagnosis(tmp_path, "cpu").checks()}
    assert checks["proofs"].status == "warn"
    assert "jobs will not know" in checks["proofs"].reason


def test_a_torch_that_cannot_be_imported_is_told_with_the_remedy(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = (
        "import argparse, sys\n"
        "from cliptune_model.cli import doctor\n"
        "parser = argparse.ArgumentParser()\n"
        "doctor.add_arguments(parser)\n"
        "sys.exit(doctor.run(parser.parse_args(['--json'])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CLIPTUNE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 1, done.stderr
    last = json.loads(done.stdout)["checks"][-1]
    assert last["name"] == "imports"
    assert "nms does not exist" in last["reason"]
    assert "pip install" in last["reason"]


def test_the_verb_imports_nothing_heavy() -> None:
    code = "import sys, cliptune_model.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[0] == "False"
