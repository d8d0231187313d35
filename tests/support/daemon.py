"""A real daemon in a process of its own, for as long as a `with` block lasts.

    with running_daemon(tmp_path / "home", data_roots=[tmp_path]) as daemon:
        grpc.insecure_channel(daemon.grpc) ... httpx.get(f"{daemon.url}/healthz") ...

It starts `cliptune serve` on free ports (without a standby engine, which costs seconds of CPU, unless
asked), reads the one line that it prints, waits on grpc.health.v1 until it is ready, and at the end sends
SIGTERM and asserts exit status 0. Its log lies beside the home and is attached to whatever goes wrong.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_LIMIT_S = 30.0
READY_LIMIT_S = 90.0
STOP_LIMIT_S = 60.0
LOG_TAIL_CHARS = 6000


@dataclass(kw_only=True, slots=True)
class RunningDaemon:
    """Handle of a daemon process. `start_s`: from launch to its line on stdout."""

    process: subprocess.Popen[bytes]
    home: Path
    log: Path
    line: dict[str, Any]
    start_s: float
    ended_by_test: bool = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    @property
    def grpc(self) -> str:
        """ "HOST:PORT" of the gRPC server."""
        return str(self.line["grpc"])

    @property
    def http(self) -> str:
        """ "HOST:PORT" of the gateway."""
        return str(self.line["http"])

    @property
    def url(self) -> str:
        """ "http://HOST:PORT" of the gateway."""
        return f"http://{self.http}"

    def wait_ready(self, timeout_s: float = READY_LIMIT_S, service: str = "") -> None:
        """Return when grpc.health.v1 says SERVING; an overrun or a dead daemon raises with its log."""
        try:
            with grpc.insecure_channel(self.grpc) as channel:
                request = health_pb2.HealthCheckRequest(service=service)
                answers = health_pb2_grpc.HealthStub(channel).Watch(
                    request, timeout=timeout_s, wait_for_ready=True
                )
                for answer in answers:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        answers.cancel()
                        return
        except grpc.RpcError as error:
            raise AssertionError(f"the daemon did not become ready: {error}\n{self.log_tail()}") from error
        raise AssertionError(f"the daemon ended its health stream unready\n{self.log_tail()}")

    def signal(self, number: int) -> None:
        """Send a signal to the daemon alone; what it ends with is then the test's business."""
        self.ended_by_test = True
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_LIMIT_S) -> int:
        """Exit status, when it has ended."""
        self.ended_by_test = True
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL: neither the daemon nor its children are told."""
        self.signal(signal.SIGKILL)
        self.process.wait(STOP_LIMIT_S)

    def stop(self, timeout_s: float = STOP_LIMIT_S) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def log_tail(self) -> str:
        """The end of its stderr."""
        return log_tail(self.log)


def log_tail(log: Path) -> str:
    """The end of a log file, for a failure's text."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return f"--- {log} ---\n{text[-LOG_TAIL_CHARS:]}"


def serve_command(
    home: Path,
    *,
    data_roots: Sequence[Path] = (),
    threads: int = 1,
    device: str = "cpu",
    standby: bool = False,
    flags: Sequence[str] = (),
) -> list[str]:
    """Argument vector of a daemon on free ports."""
    spare = () if standby else ("--no-standby",)
    roots = [part for root in data_roots for part in ("--data-root", str(root))]
    return [
        *(sys.executable, "-m", "cliptune_server"),
        *("--home", str(home), "--host", "127.0.0.1", "--grpc-port", "0", "--http-port", "0"),
        *("--device", device, "--threads", str(threads), *spare),
        # A test says what is served; `flags` may name it again.
        *("--default-model", "none"),
        *roots,
        *flags,
    ]


def start_daemon(
    home: Path,
    *,
    data_roots: Sequence[Path] = (),
    threads: int = 1,
    device: str = "cpu",
    standby: bool = False,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> RunningDaemon:
    """Start one and return when it listens; it may not be ready yet. Its end is up to the caller."""
    log = home.parent / f"{home.name}.daemon.log"
    home.parent.mkdir(parents=True, exist_ok=True)
    command = serve_command(
        home, data_roots=data_roots, threads=threads, device=device, standby=standby, flags=flags
    )
    inherited = {name: value for name, value in os.environ.items() if name != "CLIPTUNE_HOME"}
    began = time.monotonic()
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**inherited, **(environment or {})},
        )
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_LIMIT_S)
    first_line = process.stdout.readline() if readable else b""
    start_s = time.monotonic() - began
    if not first_line:
        process.kill()
        status = process.wait()
        process.stdout.close()
        raise AssertionError(f"the daemon said nothing and ended with {status}\n{log_tail(log)}")
    return RunningDaemon(process=process, home=home, log=log, line=json.loads(first_line), start_s=start_s)


@contextmanager
def running_daemon(
    home: Path,
    *,
    data_roots: Sequence[Path] = (),
    threads: int = 1,
    device: str = "cpu",
    standby: bool = False,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    wait_ready: bool = True,
) -> Iterator[RunningDaemon]:
    """A daemon that is ready inside the block, stopped by SIGTERM after it, with exit status 0."""
    daemon = start_daemon(
        home,
        data_roots=data_roots,
        threads=threads,
        device=device,
        standby=standby,
        flags=flags,
        environment=environment,
    )
    try:
        if wait_ready:
            daemon.wait_ready()
        yield daemon
    except BaseException as error:
        error.add_note(daemon.log_tail())
        raise
    else:
        if not daemon.ended_by_test:
            daemon.process.terminate()
            try:
                status = daemon.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired as overrun:
                raise AssertionError(f"SIGTERM did not end the daemon\n{daemon.log_tail()}") from overrun
            assert status == 0, f"the daemon ended with {status}\n{daemon.log_tail()}"
    finally:
        if daemon.process.poll() is None:
            daemon.process.terminate()
            try:
                daemon.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()
        assert daemon.process.stdout is not None
        daemon.process.stdout.close()
