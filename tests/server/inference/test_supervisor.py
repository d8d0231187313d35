"""Engines that are killed, stopped, stuck, broken: replaced, and their callers told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cliptune.errors import UnavailableError
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, tensor_pb2
from cliptune_server.inference.engine_process import EngineConfig
from cliptune_server.inference.engines import EngineState, EngineSupervisor
from tests.server.inference.catalog import Told, supervising
from tests.support import images

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPLACED_WITHIN_S = 10.0
NOT_READY_WITHIN_S = 5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def supervised(model_dir: Path, other_model_dir: Path) -> AsyncIterator[tuple[EngineSupervisor, Told]]:
    async with supervising(EngineConfig(device="cpu", threads=1)) as (engines, told):
        await engines.load("m:1", model_dir)
        await engines.load("m:2", other_model_dir)
        yield engines, told


async def embed(engines: EngineSupervisor, model: str = "m:1", text: str = "a red circle") -> list[float]:
    request = inference_pb2.EmbedTextsRequest(model=model, texts=[text])
    response = await engines.call(lambda stub: stub.EmbedTexts, request, 30)
    return [float(value) for value in unpack(response.embeddings)[0]]


async def embed_many_images(engines: EngineSupervisor) -> None:
    items = [tensor_pb2.Image(encoded=images.jpeg(size=256))] * 1000
    request = inference_pb2.EmbedImagesRequest(model="m:1", images=items)
    await engines.call(lambda stub: stub.EmbedImages, request, None)


async def in_flight(engines: EngineSupervisor) -> asyncio.Task[None]:
    """A long request that the engine is working on."""
    asking = asyncio.create_task(embed_many_images(engines))
    while not any(queue.waiting_items for queue in (await engines.status()).queues):
        assert not asking.done()
    return asking


def ready(state: EngineState) -> bool:
    return state.ready


def away(state: EngineState) -> bool:
    return not state.ready


async def standby_ready(engines: EngineSupervisor) -> None:
    """When the standby has started: a second accident right after a first is another test's business."""
    standby = engines._standby
    assert standby is not None
    await asyncio.wait((standby,), timeout=60)


def socket_folders() -> set[Path]:
    """Of this process: other tests run beside it."""
    return set(Path(tempfile.gettempdir()).glob(f"cliptune-engine-{os.getpid()}-*"))


def is_there(folder: str) -> bool:
    return Path(folder).exists()


@pytest.mark.parametrize("accident", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_engine_that_is_killed_or_stopped_is_replaced_with_its_models_within_10_s(
    supervised: tuple[EngineSupervisor, Told], accident: signal.Signals, model_dir: Path
) -> None:
    engines, told = supervised
    await engines.load("unloaded:1", model_dir)
    for _ in range(2):
        await engines.unload("unloaded:1")
    await standby_ready(engines)
    told.states.clear()
    vectors = [await embed(engines, model) for model in ("m:1", "m:2")]
    restarts, pid = engines.restarts, engines.pid
    assert pid is not None
    asking = await in_flight(engines)
    began_s = time.monotonic()
    os.kill(pid, accident)
    with pytest.raises(UnavailableError) as caught:
        await asking
    assert not engines.ready  # whoever is told of the end, finds readiness off already
    assert float(caught.value.metadata["retry_after_s"]) > 0
    state = await told.until(away)
    assert ("killed by signal 9" if accident is signal.SIGKILL else "does not answer") in state.reason
    with pytest.raises(UnavailableError) as refused:
        async with asyncio.timeout(1):
            await embed(engines)
    assert float(refused.value.metadata["retry_after_s"]) > 0
    await told.until(ready)
    assert time.monotonic() - began_s < REPLACED_WITHIN_S
    assert engines.restarts == restarts + 1
    assert engines.pid != pid
    assert [await embed(engines, model) for model in ("m:1", "m:2")] == vectors
    assert {model.key for model in (await engines.status()).models} == {"m:1", "m:2"}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_model_that_cannot_be_loaded_again_is_named_and_the_others_are_served(
    model_dir: Path, other_model_dir: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    config = EngineConfig(device="cpu", threads=1, canary_s=0.5, standby=False)
    async with supervising(config) as (engines, told):
        link = tmp_path / "link"
        link.symlink_to(other_model_dir)
        await engines.load("m:1", model_dir)
        await engines.load("m:2", link)
        await told.until(ready)
        link.rename(moved)
        assert engines.pid is not None
        os.kill(engines.pid, signal.SIGKILL)
        await told.until(lambda state: "model m:2 is not loaded" in state.reason)
        await embed(engines, "m:1")
        moved.rename(link)
        await told.until(ready)  # tried again
        await embed(engines, "m:2")


async def test_a_device_that_hangs_or_keeps_failing_gets_its_engine_replaced(
    model_dir: Path, tmp_path: Path
) -> None:
    command = (sys.executable, "-m", "tests.server.inference.faulty_engine", str(tmp_path))
    config = EngineConfig(command=command, device="cpu", threads=1, canary_s=1.0)
    async with supervising(config) as (engines, told):
        await engines.load("m:1", model_dir)
        await told.until(ready)
        await standby_ready(engines)

        told.states.clear()
        (tmp_path / "hang").touch()
        began_s = time.monotonic()
        asking = asyncio.create_task(embed(engines))
        await told.until(away)
        assert time.monotonic() - began_s < NOT_READY_WITHIN_S
        with pytest.raises(UnavailableError):
            await asking
        state = await told.until(lambda state: "is stuck" in state.reason)
        await told.until(ready)
        assert time.monotonic() - began_s < REPLACED_WITHIN_S, state.reason
        await embed(engines)

        told.states.clear()
        (tmp_path / "slow").touch()
        began_s = time.monotonic()
        asking = asyncio.create_task(embed(engines, text="one that is not remembered"))
        state = await told.until(away)
        assert "seems to be stuck" in state.reason
        assert time.monotonic() - began_s < NOT_READY_WITHIN_S
        (tmp_path / "slow").unlink()
        await told.until(ready)
        await asking
        assert engines.restarts == 1  # it was only slow

        await standby_ready(engines)
        told.states.clear()
        (tmp_path / "fail").touch()
        await told.until(lambda state: "failed its canary twice" in state.reason)
        (tmp_path / "fail").unlink()
        await told.until(ready)
        await embed(engines)


async def test_an_engine_that_never_starts_is_tried_more_and_more_slowly_and_callers_do_not_wait() -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    async with supervising(EngineConfig(command=command)) as (engines, told):
        retry_after_s: list[float] = []
        while len(retry_after_s) < 4:
            await told.until(lambda state: "ended with status 3" in state.reason)
            with pytest.raises(UnavailableError, match="status 3") as refused:
                async with asyncio.timeout(1):
                    await embed(engines)
            retry_after_s.append(float(refused.value.metadata["retry_after_s"]))
        assert retry_after_s == sorted(retry_after_s)
        assert retry_after_s[-1] > retry_after_s[0]


async def test_stopping_answers_what_is_in_flight_and_leaves_nothing_behind(model_dir: Path) -> None:
    before = socket_folders()
    async with supervising(EngineConfig(device="cpu", threads=1, standby=False)) as (engines, told):
        await engines.load("m:1", model_dir)
        await told.until(ready)
        pid = engines.pid
        assert pid is not None
        assert len(socket_folders() - before) == 1
        asking = await in_flight(engines)
        stopping = asyncio.create_task(engines.stop(60))
        await asking
        await stopping
        assert engines.reason == "the engine is stopping"
        with pytest.raises(UnavailableError):
            await embed(engines)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert socket_folders() == before


DAEMON = """
import asyncio, json, sys
from pathlib import Path
from cliptune_server.inference.engine_process import EngineConfig
from cliptune_server.inference.engines import EngineSupervisor

async def main():
    engines = EngineSupervisor(EngineConfig(device="cpu", threads=1, standby=False))
    await engines.start()
    await engines.load("m:1", Path(sys.argv[1]))
    print(json.dumps({"engine": engines.pid, "folder": str(engines._folder)}), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_no_engine_outlives_a_daemon_that_is_killed(model_dir: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(model_dir), stdout=pipe, stderr=pipe
    )
    assert daemon.stdout is not None
    assert daemon.stderr is not None
    line = json.loads(await daemon.stdout.readline())
    try:
        if sys.platform == "linux":  # even one that is stopped itself
            os.kill(line["engine"], signal.SIGSTOP)
        daemon.kill()
        await daemon.wait()
        async with asyncio.timeout(20):
            await daemon.stderr.read()  # the engine's too: it ends with the last of them
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(line["engine"], signal.SIGKILL)
    # The next daemon sweeps its sockets away.
    engines = EngineSupervisor(EngineConfig(command=(sys.executable, "-c", ""), standby=False))
    await engines.start()
    await engines.stop(1)
    assert not is_there(line["folder"])


async def test_the_daemons_side_imports_neither_torch_nor_the_model_room() -> None:
    code = (
        "import sys, cliptune_server.inference.router, cliptune_server.rpc.inference; "
        "print([name for name in ('torch', 'open_clip', 'PIL', 'cliptune_model') if name in sys.modules])"
    )
    asked = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    printed, _ = await asked.communicate()
    assert printed.strip() == b"[]"
