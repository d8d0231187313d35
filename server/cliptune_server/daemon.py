"""The daemon: every part made, started, and stopped in order, on one event loop and without torch.

Enters: a `ServerConfig`. Leaves: a serving process until SIGTERM or SIGINT. Called by `cli.py`.

Start: home (lock) → index → ports → models, engine (in the background) → jobs, data sets → gRPC and HTTP →
announced.
Stop: unready → no new calls → trainers checkpoint and watches end, while calls in flight are answered →
engine → index → home. A second signal ends the process at once; trainers then go on alone, and the engine
ends with us.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cliptune_server import listening
from cliptune_server.catalog.model_files import ModelFiles
from cliptune_server.catalog.models import Models
from cliptune_server.catalog.registry import Registry
from cliptune_server.config import JobsConfig, ServerConfig
from cliptune_server.database import Database
from cliptune_server.datasets.datasets import Datasets
from cliptune_server.datasets.stored import StoredDatasets
from cliptune_server.gateway.app import build_app
from cliptune_server.gateway.context import GatewayContext
from cliptune_server.gateway.image_urls import ImageUrls, UrlRules
from cliptune_server.home import Home
from cliptune_server.http_server import HttpServer
from cliptune_server.inference.engine_process import EngineConfig
from cliptune_server.inference.engines import EngineState, EngineSupervisor
from cliptune_server.inference.router import Router
from cliptune_server.inference.yielding import Yielding
from cliptune_server.metrics import Metrics
from cliptune_server.open_inference.inference import OpenInference
from cliptune_server.readiness import Part, Readiness
from cliptune_server.rpc.data import DataServicer
from cliptune_server.rpc.inference import InferenceServicer
from cliptune_server.rpc.models import ModelServicer
from cliptune_server.rpc.open_inference import OpenInferenceServicer
from cliptune_server.rpc.server import RpcServer
from cliptune_server.rpc.training import TrainingServicer
from cliptune_server.training.jobs import Jobs
from cliptune_server.training.launcher import LocalLauncher
from cliptune_server.training.link import LinkService

log = logging.getLogger(__name__)

# An engine has nothing left to answer when the faces are closed; this is for its own end.
_ENGINE_GRACE_S: Final = 5.0
_FORCED_STATUS: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A daemon that listens."""

    grpc: str
    """ "HOST:PORT"."""
    http: str
    home: Path
    pid: int


class Daemon:
    """One daemon. `run` it once, on the main thread's loop."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._readiness = Readiness()
        self._metrics = Metrics()
        self._stop = asyncio.Event()

    async def run(self, announce: Callable[[Serving], None]) -> None:
        """Serve until told to stop; `announce` hears when the ports answer.

        `HomeLockedError`: another daemon owns the home. `ConflictError`: a port is in use.
        """
        config, readiness = self._config, self._readiness
        async with AsyncExitStack() as stack:
            # Blocking, and nothing is served yet.
            home = stack.enter_context(Home.open(config.home))
            database = Database.open(home.database_path)
            stack.callback(database.close)
            http_socket = stack.enter_context(listening.bind(config.host, config.http_port, "http"))
            rpc = RpcServer(limits=config.limits, readiness=readiness, observe=self._metrics.observe_rpc)
            grpc_port = rpc.bind(config.host, config.grpc_port)

            engines = EngineSupervisor(
                EngineConfig(
                    device=config.device,
                    threads=config.threads,
                    home=config.home,
                    code_folders=config.code_folders,
                    message_bytes=config.limits.message_bytes,
                    precision=config.precision,
                    decode=config.decode,
                    cache_bytes=config.embedding_cache_bytes,
                    standby=config.standby,
                ),
                on_change=self._on_engine,
            )
            registry = Registry(ModelFiles(home.models_dir), database)
            models = Models(
                registry=registry,
                engines=engines,
                serving_path=home.serving_path,
                default_model=config.default_model,
            )
            router = Router(engines, models.catalog, message_bytes=config.limits.message_bytes)
            stored_datasets = StoredDatasets(home.data_dir)
            jobs = Jobs(
                home=home,
                database=database,
                launcher=LocalLauncher(code_folders=config.code_folders),
                link=LinkService(home.link_path()),
                publisher=models,
                data_names=stored_datasets,
                config=JobsConfig(data_roots=config.data_roots),
            )
            datasets = Datasets(stored_datasets, config=config.datasets, users=jobs.users_of)
            await engines.start()
            stack.push_async_callback(engines.stop, _ENGINE_GRACE_S)
            await models.start()
            stack.push_async_callback(models.stop)
            await stack.enter_async_context(self._restored(models))
            await jobs.start()
            readiness.set(Part.JOBS, ready=True)
            await datasets.start()
            stack.callback(datasets.stop)
            if config.yield_to_inference:
                yielding = Yielding(
                    router.traffic, device=lambda: engines.device, tell=jobs.yield_to_inference
                )
                await stack.enter_async_context(_in_background(yielding.run(), "yielding"))

            open_inference = OpenInference(router=router, models=models, readiness=readiness)
            rpc.add(
                training=TrainingServicer(jobs),
                inference=InferenceServicer(router),
                open_inference=OpenInferenceServicer(open_inference),
                models=ModelServicer(models),
                data=DataServicer(datasets),
            )
            app = build_app(
                GatewayContext(
                    jobs=jobs,
                    router=router,
                    open_inference=open_inference,
                    models=models,
                    datasets=datasets,
                    engines=engines,
                    readiness=readiness,
                    metrics=self._metrics,
                    image_urls=ImageUrls(
                        UrlRules(hosts=config.image_hosts, private=config.private_image_hosts)
                    ),
                    max_body_bytes=config.limits.message_bytes,
                )
            )
            http = HttpServer(app, http_socket, grace_s=config.grace_s)
            self._handle_signals()
            await rpc.start()
            http.start()
            serving = Serving(
                grpc=listening.address(config.host, grpc_port),
                http=listening.address(config.host, http_socket.getsockname()[1]),
                home=home.root,
                pid=os.getpid(),
            )
            home.announce(grpc=serving.grpc, http=serving.http)
            announce(serving)
            log.info("serving gRPC on %s and HTTP on %s from %s", serving.grpc, serving.http, home.root)
            await self._stop.wait()

            log.info("stopping: jobs checkpoint, calls in flight are answered within %.0f s", config.grace_s)
            readiness.stop()
            datasets.end_uploads()

            async def stop_jobs() -> None:
                await jobs.stop(config.grace_s)
                rpc.end_sessions()

            ends = (rpc.stop(config.grace_s), http.stop(), stop_jobs())
            for outcome in await asyncio.gather(*ends, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    log.error("a part did not stop cleanly", exc_info=outcome)
        log.info("stopped")

    def _on_engine(self, state: EngineState) -> None:
        self._readiness.set(Part.ENGINE, ready=state.ready, reason=state.reason)

    @asynccontextmanager
    async def _restored(self, models: Models) -> AsyncIterator[None]:
        """What was served before is loaded in the background: it waits for the engine."""

        async def restore() -> None:
            try:
                await models.restore()
            except Exception:
                log.exception("models that were served before could not be loaded")
            self._readiness.set(Part.MODELS, ready=True)

        self._readiness.set(Part.MODELS, ready=False, reason="models are being loaded")
        async with _in_background(restore(), "restore-models"):
            yield

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            log.warning("%s again: ending at once", signal.Signals(number).name)
            logging.shutdown()
            os._exit(_FORCED_STATUS)
        self._stop.set()


@asynccontextmanager
async def _in_background(work: Coroutine[None, None, None], name: str) -> AsyncIterator[None]:
    """`work` runs beside the block and is given up at its end; a fault of it is logged, and harms nobody."""

    async def guarded() -> None:
        try:
            await work
        except Exception:
            log.exception("%s failed", name)

    task = asyncio.create_task(guarded(), name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
