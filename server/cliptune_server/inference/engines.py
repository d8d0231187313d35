"""Keeps one engine running, whatever happens to it.

Enters: models to load, calls to forward. Leaves: their answers, and the truth about readiness: a real forward
through every loaded model, every few seconds. Used by `Router` (calls), `Models` (load, unload), the daemon.

    starting → up ⇄ (dead | stuck → SIGKILL → the standby takes over → its models are loaded → canary) → up

An engine is replaced when its process ends (noticed at once), when two heartbeats in a row are not answered
(stopped, or its interpreter is blocked), when its work has run for longer than it may (a hung device), or
when its canary fails twice (a device error that stays). Callers are told `UnavailableError` meanwhile. One
heartbeat that is not answered, or work that has used most of its time, takes readiness away, within 5 s of a
hang, and no more: whatever was only slow gives it back.
Measured with the tiny model on two cores: replaced 0.2 s after SIGKILL and 5 to 6 s after SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from cliptune.errors import CliptuneError, InternalError, OverloadedError, UnavailableError
from cliptune.internal.v1 import engine_pb2
from cliptune_server.inference.engine_process import EngineConfig, EngineProcess
from cliptune_server.inference.refusals import Measured, Refusals

# An engine that lived so long was no part of a crash loop.
_STEADY_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
# What loading a model and a canary take beside the pause; an estimate for callers who come back.
_USUAL_REPLACEMENT_S: Final = 2.0
_CRASHES_A_MODEL_MAY_CAUSE: Final = 2
# macOS allows 104 bytes for a socket's path.
_MAX_FOLDER_BYTES: Final = 80

_log = logging.getLogger(__name__)

_Request = TypeVar("_Request", bound=Measured)
_Response = TypeVar("_Response")

if TYPE_CHECKING:
    from cliptune_server.inference.engine_process import Pick


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """Whether the last canary passed; `reason` says why not."""

    ready: bool
    reason: str = ""


class EngineSupervisor:
    """One device's engine. `start` it, then `load` models; `on_change` hears of each change of readiness."""

    def __init__(
        self, config: EngineConfig | None = None, *, on_change: Callable[[EngineState], None] | None = None
    ) -> None:
        self._config: Final = config or EngineConfig()
        self._on_change: Final = on_change
        self._state = EngineState(ready=False, reason="the engine is starting")
        self._said = self._state
        """By its canary; without doubts."""
        self._doubted = ""
        self._active: EngineProcess | None = None
        self._up: Final = asyncio.Event()
        self._standby: asyncio.Task[EngineProcess] | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._stopping: Final = asyncio.Event()
        self._models: dict[str, Path] = {}
        """What is to be loaded, by key."""
        self._missing: dict[str, str] = {}
        """Of those, what could not be loaded again, and why."""
        self._crashes: Final[Counter[str]] = Counter()
        self._refusals: Final = Refusals()
        self._change: Final = asyncio.Lock()
        self._retry_after_s = _USUAL_REPLACEMENT_S
        self._folder: Path | None = None
        self._launched = 0
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """The last canary passed and the engine lives."""
        return self._state.ready

    @property
    def reason(self) -> str:
        """Why not ready. Empty when ready."""
        return self._state.reason

    @property
    def pid(self) -> int | None:
        """The process that answers now."""
        return self._active.pid if self._active else None

    @property
    def device(self) -> str:
        """Of the engine that answers now: "cpu", "mps", "cuda:0". Empty while there is none."""
        device = self._active.device if self._active else ""
        return "cuda:0" if device == "cuda" else device

    async def start(self) -> None:
        """Begins; returns at once. The first engine is up a few seconds later."""
        self._folder = _socket_folder()
        self._supervising = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self, grace_s: float) -> None:
        """The engine answers what it has accepted, for at most `grace_s`, and ends."""
        self._stopping.set()
        self._say(ready=False)
        if self._active is not None:
            await self._active.stop(grace_s)
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.cancel()
            for outcome in await asyncio.gather(standby, return_exceptions=True):
                if isinstance(outcome, EngineProcess):
                    await outcome.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def load(self, key: str, path: Path) -> engine_pb2.LoadedModel:
        """Loads the model folder `path` as `key`; returns when it has answered a canary.

        A starting engine is waited for. The model is loaded again in every later engine until `unload`.
        """
        while True:
            engine = await self._engine_when_up()
            async with self._change:
                if engine is self._active:
                    self._crashes.pop(key, None)
                    model = await self._load(engine, key, path)
                    self._models[key] = path
                    self._missing.pop(key, None)
                    return model

    async def unload(self, key: str) -> None:
        """Returns when the model's requests in flight are answered. Nothing happens when it is not loaded."""
        async with self._change:
            was_loaded = self._models.pop(key, None) is not None and self._missing.pop(key, None) is None
            engine = self._active
        if was_loaded and engine is not None:
            with contextlib.suppress(UnavailableError):  # an engine that ended has unloaded it too
                await engine.call(lambda stub: stub.Unload, engine_pb2.UnloadRequest(key=key), None)

    async def canary(self) -> float:
        """A forward through every loaded model by the path of requests; its seconds."""
        timeout_s = self._config.canary_timeout_s
        return (await self.call(lambda stub: stub.Canary, engine_pb2.CanaryRequest(), timeout_s)).seconds

    async def status(self) -> engine_pb2.StatusResponse:
        """The engine's own word, answered at once whatever its device does; and what was refused for it."""
        timeout_s = self._config.heartbeat_timeout_s
        status = await self.call(lambda stub: stub.Status, engine_pb2.StatusRequest(), timeout_s)
        status.shed_requests += self._refusals.repeated
        return status

    async def call(
        self,
        pick: Pick[_Request, _Response],
        request: _Request,
        timeout_s: float | None = None,
        *,
        bulk: bool = False,
    ) -> _Response:
        """Forwards one call: `call(lambda stub: stub.EmbedTexts, request, 5.0)`; `bulk`: others go first.

        `UnavailableError` at once while there is no engine, and when it ends during the call.
        `OverloadedError` where the engine says so, or has just said so.
        """
        engine = self._active
        if engine is None or engine.condemned:
            reason = self.reason or "the engine is being replaced"
            raise UnavailableError(reason, retry_after_s=f"{self._retry_after_s:g}")
        self._refusals.check(request, timeout_s, bulk=bulk)
        try:
            return await engine.call(pick, request, timeout_s, bulk=bulk)
        except OverloadedError as error:
            self._refusals.note(request, timeout_s, error, bulk=bulk)
            raise

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began_s = time.monotonic()
            verdict = await self._serve_with_one_engine()
            if self._stopping.is_set():
                return
            self.restarts += 1
            failures = 0 if time.monotonic() - began_s > _STEADY_S else failures + 1
            # A single accident is no reason to wait: the standby takes over at once.
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (failures - 2)) if failures > 1 else 0.0
            self._retry_after_s = pause_s + _USUAL_REPLACEMENT_S
            when = f" in {pause_s:g} s" if pause_s else ""
            self._say(ready=False, reason=f"the engine {verdict}; it is being replaced{when}")
            _log.error("the engine %s", verdict, extra={"restarts": self.restarts, "pause_s": pause_s})
            await asyncio.sleep(pause_s)

    async def _serve_with_one_engine(self) -> str:
        """From a process's start to its end. Returns the verdict over it."""
        try:
            engine = await self._take()
        except UnavailableError as error:
            return error.message.removeprefix("the engine ")
        # The first to hear of the verdict: no caller is told of the end before readiness tells of it too.
        engine.verdict.add_done_callback(self._withdraw)
        beating = asyncio.create_task(engine.beat(self._doubt))
        tasks = (beating, asyncio.create_task(self._keep_serving(engine)))
        try:
            return await asyncio.shield(engine.verdict)
        finally:
            for task in tasks:
                task.cancel()
            await engine.kill()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _withdraw(self, verdict: asyncio.Future[str]) -> None:
        self._active = None
        self._doubted = ""
        self._up.clear()
        if not verdict.cancelled() and not self._stopping.is_set():
            self._say(ready=False, reason=f"the engine {verdict.result()}; it is being replaced")

    async def _take(self) -> EngineProcess:
        """The standby, also one that is still starting; else a new process."""
        standby, self._standby = self._standby, None
        if standby is not None:
            with contextlib.suppress(UnavailableError):
                engine = await standby
                if not engine.verdict.done():
                    return engine
                await engine.kill()
        return await self._launch()

    async def _launch(self) -> EngineProcess:
        self._launched += 1
        assert self._folder is not None
        return await EngineProcess.launch(self._folder / f"{self._launched}.sock", self._config)

    def _ensure_standby(self) -> None:
        """A standby that ended is replaced at the next canary, which bounds how often that happens."""
        standby = self._standby
        if not self._config.standby or (standby is not None and not standby.done()):
            return
        if standby is None or standby.exception() is not None or standby.result().condemned:
            if standby is not None and standby.exception() is None:
                _log.warning("the standby engine %s", standby.result().verdict.result())
            self._standby = asyncio.create_task(self._launch(), name="engine-standby")

    async def _keep_serving(self, engine: EngineProcess) -> None:
        """Loads its models, lets callers in, and asks for a canary every few seconds."""
        try:
            await self._serve_and_check(engine)
        except Exception:
            _log.exception("supervision failed")
            engine.condemn("was given up after a failure of its supervision")

    async def _serve_and_check(self, engine: EngineProcess) -> None:
        failed = 0
        while not engine.condemned:
            async with self._change:
                if not await self._load_missing(engine) or engine.verdict.done():
                    return
                self._active = engine
                self._up.set()
            try:
                await self.canary()
            except InternalError as error:
                failed += 1
                self._say(ready=False, reason=f"the engine's canary failed: {error.message}")
                if failed == 2:
                    engine.condemn(f"failed its canary twice ({error.message})")
            except CliptuneError as error:
                if not engine.verdict.done():
                    self._say(ready=False, reason=f"the engine's canary was not answered: {error.message}")
            else:
                if engine.verdict.done():
                    return
                failed = 0
                missing = "; ".join(f"model {key} is not loaded: {why}" for key, why in self._missing.items())
                self._say(ready=not missing, reason=missing)
                self._ensure_standby()
            await engine.ends_within(self._config.canary_s)

    async def _load_missing(self, engine: EngineProcess) -> bool:
        """All models into a new engine; later those that it has not got: their trouble may be over.

        False: the engine did not survive it.
        """
        for key, path in list(self._models.items()):
            if engine is self._active and key not in self._missing:
                continue
            if self._crashes[key] >= _CRASHES_A_MODEL_MAY_CAUSE:
                self._tell_missing(key, "the engine ended each time while loading it")
                continue
            try:
                await self._load(engine, key, path)
            except UnavailableError:
                self._crashes[key] += 1
                engine.condemn(f"ended while loading {key}")
                return False
            except CliptuneError as error:
                self._tell_missing(key, error.message)
            else:
                self._crashes.pop(key, None)
                self._missing.pop(key, None)
        return True

    async def _load(self, engine: EngineProcess, key: str, path: Path) -> engine_pb2.LoadedModel:
        request = engine_pb2.LoadRequest(key=key, path=str(path))
        return (await engine.call(lambda stub: stub.Load, request, self._config.load_timeout_s)).model

    async def _engine_when_up(self) -> EngineProcess:
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                while self._active is None and not self._stopping.is_set():
                    await self._up.wait()
        except TimeoutError:
            pass
        if self._active is None:
            raise UnavailableError(self.reason, retry_after_s=f"{self._retry_after_s:g}")
        return self._active

    def _tell_missing(self, key: str, why: str) -> None:
        if self._missing.get(key) != why:
            _log.error("model %s could not be loaded again: %s", key, why)
        self._missing[key] = why

    def _say(self, *, ready: bool, reason: str = "") -> None:
        if self._stopping.is_set():  # what fails now fails for this
            ready, reason = False, "the engine is stopping"
        self._said = EngineState(ready=ready, reason=reason)
        self._publish()

    def _doubt(self, why: str) -> None:
        self._doubted = why
        self._publish()

    def _publish(self) -> None:
        state = self._said
        if state.ready and self._doubted:
            state = EngineState(ready=False, reason=f"the engine {self._doubted}")
        if state != self._state:
            self._state = state
            if self._on_change is not None:
                self._on_change(state)


def _socket_folder() -> Path:
    """A private folder; folders of daemons that were killed are swept away."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) > _MAX_FOLDER_BYTES - len("cliptune-engine-1234567-12345678"):
        base = Path("/tmp")
    for stale in base.glob("cliptune-engine-*"):
        with contextlib.suppress(OSError, ValueError):
            if stale.stat().st_uid == os.getuid() and not _alive(int(stale.name.split("-")[2])):
                shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"cliptune-engine-{os.getpid()}-", dir=base))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
