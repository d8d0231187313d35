"""The daemon as a process: its start, its one line, its faces, and every way to stop it."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cliptune.errors import NotFoundError, UnavailableError
from cliptune.v1 import inference_pb2, inference_pb2_grpc, tensor_pb2, training_pb2, training_pb2_grpc
from cliptune.wire import error_from_rpc
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon, serve_command
from tests.support.models import publish_test_model

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OURS = {f"cliptune.v1.{name}Service" for name in ("Training", "Inference", "Model", "Data")}
OURS.add("inference.GRPCInferenceService")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon") / "home") as daemon:
        yield daemon


@pytest.fixture
def channel(daemon: RunningDaemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(daemon.grpc) as channel:
        yield channel


class Sending:
    """The client's half of a stream, sent when the test says so."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, request: Any) -> None:
        self._waiting.put(request)

    def done(self) -> None:
        self._waiting.put(None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._waiting.get, None)


def refused(home: Path, *flags: str) -> str:
    """What a daemon that cannot start says; its status is 1."""
    command = serve_command(home, flags=flags)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    return ended.stderr


def wait_for_stopping(channel: grpc.Channel, daemon: RunningDaemon, number: int) -> None:
    """Signal the daemon and return when it says that it stops, which also ends the health stream well."""
    answers = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="cliptune.v1.TrainingService"), timeout=60
    )
    assert next(answers).status == SERVING
    daemon.signal(number)
    assert [answer.status for answer in answers] == [NOT_SERVING]


def test_one_line_says_where_it_listens_without_waiting_for_the_engine(tmp_path: Path) -> None:
    # No machine has this device, so the engine is never ready; the line comes and both faces answer.
    with running_daemon(tmp_path / "home", device="cuda:99", wait_ready=False) as daemon:
        assert set(daemon.line) == {"cliptune", "grpc", "http", "home", "pid"}
        assert daemon.line["cliptune"] == "serving"
        assert (daemon.line["home"], daemon.line["pid"]) == (str(daemon.home), daemon.pid)
        addresses = {"pid": daemon.pid, "grpc": daemon.grpc, "http": daemon.http}
        assert json.loads((daemon.home / "daemon.json").read_text()) == addresses
        assert httpx.get(f"{daemon.url}/healthz").status_code == 200
        not_ready = httpx.get(f"{daemon.url}/readyz")
        assert not_ready.status_code == 503
        assert "engine" in not_ready.json()["detail"]
        with grpc.insecure_channel(daemon.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == NOT_SERVING
        assert daemon.stop() == 0
        assert daemon.process.stdout is not None
        assert daemon.process.stdout.read() == b""
        assert not (daemon.home / "daemon.json").exists()


def test_the_daemon_process_never_imports_torch(daemon: RunningDaemon) -> None:
    code = (
        "import sys, cliptune_server.daemon, cliptune_server.cli\n"
        "print([name for name in ('torch', 'open_clip', 'PIL', 'cliptune_model') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
    maps = Path(f"/proc/{daemon.pid}/maps")
    if maps.exists():  # what the running one has loaded, after its canary
        assert "libtorch" not in maps.read_text()


def test_a_second_daemon_on_the_same_home_is_refused_by_name_of_the_first(daemon: RunningDaemon) -> None:
    told = refused(daemon.home)
    assert "HomeLockedError" in told
    for part in (str(daemon.home), f"pid {daemon.pid}", daemon.grpc, daemon.http):
        assert part in told
    daemon.wait_ready()


@pytest.mark.parametrize("face", ["grpc", "http"])
def test_a_port_in_use_is_told_with_the_flag_that_helps_and_frees_the_home(face: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(tmp_path / "home", f"--{face}-port", str(port))
    assert f"port {port} of 127.0.0.1 is in use" in told
    assert f"--{face}-port" in told
    assert "Traceback" not in told
    with running_daemon(tmp_path / "home", wait_ready=False):
        pass


def test_wrong_flags_are_refused_with_the_value(tmp_path: Path) -> None:
    for flag, value in (("--device", "gpu"), ("--threads", "0"), ("--data-root", str(tmp_path / "no"))):
        command = serve_command(tmp_path / "home", flags=(flag, value))
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2
        assert value in ended.stderr


def test_health_tells_of_the_whole_and_of_each_service(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", *OURS):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
    with pytest.raises(grpc.RpcError) as raised:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert isinstance(error_from_rpc(raised.value), NotFoundError)
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


def test_several_health_watchers_hear_of_the_canary_and_jobs_do_not_wait_for_it(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path / "home", wait_ready=False) as daemon,
        grpc.insecure_channel(daemon.grpc) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=90) for _ in range(3)]
        for watch in watches:
            assert next(watch).status == NOT_SERVING
        jobs = health_pb2.HealthCheckRequest(service="cliptune.v1.TrainingService")
        assert stub.Check(jobs).status == SERVING
        for watch in watches:
            assert next(watch).status == SERVING
            watch.cancel()


def test_reflection_lists_every_service(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(stub.ServerReflectionInfo(iter([request])))
    names = {service.name for service in answer.list_services_response.service}
    assert names == OURS | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_sigterm_answers_what_was_accepted_and_the_trace_goes_from_the_client_to_the_forward(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    publish_test_model(home, "shapes", serve=True)
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    picture = tensor_pb2.Image(encoded=images.png())
    with running_daemon(home, environment={"OTEL_TRACES_EXPORTER": "console"}) as daemon:
        with grpc.insecure_channel(daemon.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            stub.EmbedImages(
                inference_pb2.EmbedImagesRequest(images=[picture]),
                metadata=(("traceparent", f"00-{trace_id}-{span_id}-01"),),
            )
            sending = Sending()
            answers = stub.EmbedStream(iter(sending), timeout=60)
            sending.send(inference_pb2.EmbedStreamRequest(id="first", image=picture))
            assert next(answers).id == "first"

            wait_for_stopping(channel, daemon, signal.SIGTERM)
            late = [str(number) for number in range(20)]
            for number in late:
                sending.send(inference_pb2.EmbedStreamRequest(id=number, image=picture))
            sending.done()
            answered = list(answers)
            assert sorted(answer.id for answer in answered) == sorted(late)
            assert all(answer.WhichOneof("result") == "embedding" for answer in answered)
        assert daemon.wait() == 0
    log = daemon.log.read_text()
    assert f'"trace_id": "0x{trace_id}"' in log
    assert f'"parent_id": "0x{span_id}"' in log
    rpc = "cliptune.v1.InferenceService/EmbedImages"
    for span in (rpc, "router.EmbedImages", "engine.decode", "engine.queue", "engine.forward"):
        assert f'"name": "{span}"' in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_that_does_not_end_in_time_fails_as_unavailable_and_the_daemon_ends_well(
    number: int, tmp_path: Path
) -> None:
    with running_daemon(tmp_path / "home", wait_ready=False, flags=("--grace", "0.5")) as daemon:
        with grpc.insecure_channel(daemon.grpc) as channel:
            sending = Sending()
            open_stream = inference_pb2_grpc.InferenceServiceStub(channel).EmbedStream(iter(sending))
            sending.send(inference_pb2.EmbedStreamRequest(id="neither image nor text"))
            assert next(open_stream).WhichOneof("result") == "error"
            wait_for_stopping(channel, daemon, number)
            with pytest.raises(grpc.RpcError) as raised:
                next(open_stream)
            assert isinstance(error_from_rpc(raised.value), UnavailableError)
            sending.done()
        assert daemon.wait() == 0


def test_an_idle_session_and_an_idle_reflection_stream_do_not_hold_a_stop_up(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path / "home", wait_ready=False, flags=("--grace", "300")) as daemon,
        grpc.insecure_channel(daemon.grpc) as channel,
    ):
        sending, asking = Sending(), Sending()
        session = training_pb2_grpc.TrainingServiceStub(channel).Session(iter(sending))
        sending.send(training_pb2.SessionRequest(request_id="1", unwatch_job_id="none"))
        assert next(session).WhichOneof("result") == "error"
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asking))
        asking.send(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert next(reflection).HasField("list_services_response")
        daemon.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as raised:
            next(session)
        assert isinstance(error_from_rpc(raised.value), UnavailableError)
        assert daemon.wait() == 0
        sending.done()
        asking.done()


def test_a_second_signal_ends_the_daemon_at_once(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path / "home", wait_ready=False, flags=("--grace", "300")) as daemon,
        grpc.insecure_channel(daemon.grpc) as channel,
    ):
        sending = Sending()
        open_stream = inference_pb2_grpc.InferenceServiceStub(channel).EmbedStream(iter(sending))
        sending.send(inference_pb2.EmbedStreamRequest(id="neither image nor text"))
        next(open_stream)
        wait_for_stopping(channel, daemon, signal.SIGTERM)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(20) == 1
        sending.done()
    with running_daemon(tmp_path / "home", wait_ready=False):
        pass
