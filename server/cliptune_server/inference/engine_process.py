"""One engine process as the daemon holds it: started, called, watched, ended.

Enters: an `EngineConfig` and the path of a Unix socket. Leaves: answers of that process, and a verdict: why
it is to be replaced. Made and ended by `EngineSupervisor`. The process holds nothing that outlives it, so
ending it is always SIGKILL, except at a clean stop.

The engine reads its stdin, whose other end is ours alone: it ends when we do, however that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast

import grpc

from cliptune import priority, tracing
from cliptune.errors import CliptuneError, InvalidInputError, RequestTooLargeError, UnavailableError
from cliptune.internal.v1 import engine_pb2, engine_pb2_grpc
from cliptune.wire import DETAILS_KEY, error_from_rpc
from cliptune_server.compute_environment import compute_environment
from cliptune_server.inference.payloads import UNREADABLE, Payloads

_KILL_LIMIT_S: Final = 3.0
# A process that is being torn down closes its sockets first; memory of gigabytes takes a moment longer.
_VERDICT_LIMIT_S: Final = 1.0
# Work that has used so much of its limit is no reason yet to end an engine, but one not to send it more: of
# a forward that takes up to 0.4 s it is over, and a heartbeat after it, within 5 s.
_DOUBT_PART: Final = 0.6

_log = logging.getLogger(__name__)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

if TYPE_CHECKING:
    # Picks a method of the engine: `lambda stub: stub.EmbedTexts`.
    Pick = Callable[
        [engine_pb2_grpc.EngineServiceAsyncStub], grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How engines are run and watched."""

    command: tuple[str, ...] = (sys.executable, "-m", "cliptune_server.engine")
    device: str = "auto"
    threads: int | None = None
    """None: the engine chooses."""
    home: Path | None = None
    """Where `cliptune doctor` keeps what it proved of the devices. None: nothing is known of them."""
    code_folders: tuple[Path, ...] = ()
    """Folders whose Python files a model's similarity may come from."""
    log_level: str = "info"
    message_bytes: int = 256 * 1024 * 1024
    """Largest message, either way."""
    cache_bytes: int = 64 * 1024 * 1024
    """Embeddings that are remembered by their item's content. 0: none."""
    precision: str = "default"
    """ "exact": fp32. "auto": the fastest whose cosine to fp32 is at least 0.999. Default: exact on a CPU."""
    decode: str = "exact"
    """ "fast": JPEG files at a part of their size, where the cosine to the exact way is at least 0.999."""
    standby: bool = True
    """Keep a second process ready that has imported everything and loaded nothing.

    Importing torch and open_clip takes 6 seconds of a core that is free, and much longer beside a trainer:
    without it an engine could not be replaced within 10 s. It costs 450 MB, and nothing on the device.
    """
    heartbeat_s: float = 1.0
    heartbeat_timeout_s: float = 2.0
    """Two heartbeats in a row unanswered for so long: stuck. One may be this very process that was asleep."""
    canary_s: float = 10.0
    """Between canaries."""
    canary_timeout_s: float = 20.0
    start_timeout_s: float = 120.0
    load_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "heartbeat_timeout_s", "canary_s", "canary_timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"engine: {name} must be above 0, not {getattr(self, name)}")


class EngineProcess:
    """A process that listens. `launch` makes it."""

    def __init__(
        self, process: asyncio.subprocess.Process, target: str, config: EngineConfig, *, device: str
    ) -> None:
        self.device: Final = device
        """What it chose: "cpu", "mps", "cuda", "cuda:1"."""
        self.payloads: Final = Payloads(Path(target.removeprefix("unix:")).parent)
        self._process: Final = process
        self._config: Final = config
        options = [
            ("grpc.max_send_message_length", config.message_bytes),
            ("grpc.max_receive_message_length", config.message_bytes),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel: Final = grpc.aio.insecure_channel(target, options=options)
        self._stub: Final = cast(
            "engine_pb2_grpc.EngineServiceAsyncStub", engine_pb2_grpc.EngineServiceStub(self._channel)
        )
        self.verdict: Final[asyncio.Future[str]] = asyncio.get_running_loop().create_future()
        """Why it is to be replaced, once that is known."""
        self._draining = False
        self._watch: Final = asyncio.create_task(self._watch_exit())

    @classmethod
    async def launch(cls, socket: Path, config: EngineConfig) -> EngineProcess:
        """Starts a process and returns when it listens. `UnavailableError` when it does not come to that."""
        command = [
            *config.command,
            "--socket",
            f"unix:{socket}",
            "--device",
            config.device,
            "--message-bytes",
            str(config.message_bytes),
        ]
        command += ["--log-level", config.log_level, "--cache-bytes", str(config.cache_bytes)]
        command += ["--precision", config.precision, "--decode", config.decode]
        if config.home is not None:
            command += ["--home", str(config.home)]
        if config.threads is not None:
            command += ["--threads", str(config.threads)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=compute_environment(os.environ, config.code_folders),
            start_new_session=True,  # Ctrl-C in a terminal is for the daemon, which stops its engine in order
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(config.start_timeout_s):
                line = await process.stdout.readline()
                if not line:
                    status = await process.wait()
                    raise UnavailableError(f"the engine did not start: {describe_exit(status)}; see the log")
            said = json.loads(line)
            _log.info("an engine listens", extra={"engine": said})
        except TimeoutError:
            await _end(process)
            limit_s = config.start_timeout_s
            raise UnavailableError(f"the engine did not start within {limit_s:.0f} s") from None
        except BaseException:
            await _end(process)
            raise
        return cls(process, f"unix:{socket}", config, device=said["device"])

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def condemned(self) -> bool:
        """It is to be replaced, or has ended."""
        return self.verdict.done()

    def condemn(self, reason: str) -> None:
        """Gives the verdict; the first one stands."""
        if not self.verdict.done():
            self.verdict.set_result(reason)

    async def call(
        self,
        pick: Pick[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
        *,
        bulk: bool = False,
    ) -> _Response:
        """One call, as part of the current trace; `bulk`: others go first.

        Raises the engine's own error, or `UnavailableError` when the engine ends meanwhile.
        """
        try:
            return await self._send(pick, request, timeout_s, priority.metadata(bulk=bulk))
        except grpc.aio.AioRpcError as error:
            if _says_why(error):
                raise error_from_rpc(error) from None
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                # The connection often breaks a moment before the process is seen to end.
                await self.ends_within(_VERDICT_LIMIT_S)
            raise self._translate(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise self._gone() from None  # the channel was closed under the call

    async def _send(
        self,
        pick: Pick[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
        said: tuple[tracing.Pair, ...],
    ) -> _Response:
        """With its images beside it, where they are large and the engine can read them there."""
        async with self.payloads.beside(request) as (message, place):
            try:
                metadata = tracing.inject((*said, *place))
                return await pick(self._stub)(message, timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if not place or UNREADABLE not in error_from_rpc(error).metadata:
                    raise
                self.payloads.turn_off(error.details() or "the engine cannot read it")
        return await pick(self._stub)(request, timeout=timeout_s, metadata=tracing.inject(said))

    async def beat(self, doubt: Callable[[str], None]) -> None:
        """Heartbeats until there is a verdict, and gives it when the engine is stuck.

        Before there is enough for a verdict, `doubt` is told what looks bad, or "" when it is well again. An
        engine that was told to stop takes no new calls, these among them: `stop` has its own limit.
        """
        missed = 0
        while not await self.ends_within(0.0 if missed else self._config.heartbeat_s):
            try:
                status = await self.call(
                    lambda stub: stub.Status, engine_pb2.StatusRequest(), self._config.heartbeat_timeout_s
                )
            except CliptuneError as error:
                if self._draining:
                    return
                missed += 1
                doubt(f"does not answer ({error.message})")
                if missed == 2:
                    self.condemn(f"does not answer ({error.message})")
                continue
            missed = 0
            ran_s, limit_s = status.running_seconds, status.stall_limit_seconds
            late = f"its work has run for {ran_s:.1f} s, and may take {limit_s:.1f} s"
            doubt(f"seems to be stuck: {late}" if ran_s > _DOUBT_PART * limit_s > 0 else "")
            if ran_s > limit_s > 0:
                self.condemn(f"is stuck: {late}")

    async def ends_within(self, timeout_s: float) -> bool:
        """Waits for a verdict; False when none came in time."""
        done, _ = await asyncio.wait((self.verdict,), timeout=timeout_s)
        return bool(done)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM: it answers what it has accepted. SIGKILL after `grace_s`."""
        self._draining = True
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            _log.warning("the engine did not stop in time", extra={"engine_pid": self.pid})
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL. Calls in flight end with `UnavailableError`."""
        self.condemn("was stopped")
        try:
            async with asyncio.timeout(_KILL_LIMIT_S):
                await _end(self._process)
        except TimeoutError:  # it hangs in a driver, where no signal reaches it
            _log.error("the engine outlives SIGKILL and is left behind", extra={"engine_pid": self.pid})
            self._watch.cancel()
        # Of a dead process the calls fail by themselves within this time; those of a hung one are cancelled.
        await self._channel.close(grace=1.0)

    async def _watch_exit(self) -> None:
        status = await self._process.wait()
        self.condemn(describe_exit(status))

    def _gone(self) -> UnavailableError:
        return UnavailableError(
            "the engine ended while it worked on this; it is being replaced", retry_after_s=1
        )

    def _translate(self, error: grpc.aio.AioRpcError) -> CliptuneError:
        told = error_from_rpc(error)
        code = error.code()
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own limit
            limit = self._config.message_bytes
            return RequestTooLargeError(
                f"a message to or from the engine is larger than {limit:,} bytes", limit=limit
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not self.verdict.done():
            return told
        if self.verdict.done() or code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return self._gone()
        return told


def _says_why(error: grpc.aio.AioRpcError) -> bool:
    """It is the engine's own answer, not the transport's."""
    return any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())


def describe_exit(status: int) -> str:
    """For a log line: "ended with status 1", "was killed by signal 9"."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    if process.stdin is not None:
        process.stdin.close()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await process.stdin.wait_closed()
