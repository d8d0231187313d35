"""The models of this engine: loaded, used, unloaded.

Enters: a key and a model folder. Leaves: `ServedModel`, held by each request that uses it, so that unloading
can wait for them. Used by `inference.py` and the servicer. A model serves only after it has answered a
canary.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from cliptune.errors import CliptuneError, InternalError, ModelStateError
from cliptune.internal.v1 import engine_pb2
from cliptune.tensors import pack
from cliptune.v1 import tensor_pb2
from cliptune_model.acceleration.fidelity import ServingWay, choose_way
from cliptune_model.acceleration.folded import fold
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.acceleration.measured import read_measured, write_measured
from cliptune_model.adapters import SharedBase
from cliptune_model.attention import AttentionPlan, install
from cliptune_model.clip import Clip
from cliptune_model.exported import MANIFEST_FILE, load_exported, read_manifest
from cliptune_model.machine.hardware import detect
from cliptune_model.machine.proofs import Proofs
from cliptune_server.engine.batcher import Batcher, Lane
from cliptune_server.engine.cache import EmbeddingCache
from cliptune_server.engine.decode import Decoder
from cliptune_server.engine.payload import pictures
from cliptune_server.engine.readying import Readying
from cliptune_server.engine.scores import Scores
from cliptune_server.engine.sizes import ImageSizes
from cliptune_server.engine.spans import Caller
from cliptune_server.engine.towers import Towers
from cliptune_server.engine.vectors import VectorCache

_log = logging.getLogger(__name__)

_CANARY_TEXT: Final = "a photo"
_CANARY_PIXELS: Final = pack(np.full((64, 48, 3), 127, dtype=np.uint8))
_CANARY_IMAGE: Final = pictures([tensor_pb2.Image(pixels=_CANARY_PIXELS)])[0]
# Reading a model from a slow disk and building it; beyond that the loading thread hangs.
_PROBE_LIMIT_S: Final = 60.0


@dataclass(eq=False, kw_only=True, slots=True)
class ServedModel:
    """One loaded model."""

    key: str
    path: str
    clip: Clip
    towers: Towers
    images: Lane
    texts: Lane
    scores: Scores
    sizes: ImageSizes
    way: ServingWay
    base: SharedBase
    """Its weights, for adapters that belong to them: one base in memory, however many adapters."""
    decoded_ahead: Mapping[bool, asyncio.Semaphore]
    """Decoded images that may wait for this model, bulk and others apart, so that bulk does not use up the
    places: two batches of each, so that one is ready while another runs."""
    trained_dims: tuple[int, ...] = ()
    """Fewer dimensions that an embedding may be cut to (Matryoshka)."""
    class_vectors: VectorCache = field(default_factory=VectorCache)
    load_seconds: float = 0.0
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def dim(self) -> int:
        """D."""
        return self.clip.embedding_dim

    def describe(self) -> engine_pb2.LoadedModel:
        """As the daemon hears of it."""
        return engine_pb2.LoadedModel(
            key=self.key,
            path=self.path,
            embedding_dim=self.dim,
            image_size=self.sizes.serving[0],
            logit_scale=self.clip.logit_scale,
            load_seconds=self.load_seconds,
            precision=self.way.precision.value,
            precision_cosine=self.way.precision_cosine,
            decode=self.way.decode.value,
            decode_cosine=self.way.decode_cosine,
            towers=self.towers.form.value,
            towers_reason=self.towers.form.reason,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """What a folder was made into."""

    towers: Towers
    base: SharedBase
    way: ServingWay
    trained_dims: tuple[int, ...]
    sizes: ImageSizes


class ModelSet:
    """Models by key, on one device. Used on the event loop."""

    def __init__(
        self,
        *,
        device: str,
        attention: AttentionPlan,
        batcher: Batcher,
        decoder: Decoder,
        decoded_ahead: int,
        cache: EmbeddingCache,
        precision: str,
        decode: str,
        proofs: Proofs,
    ) -> None:
        """`precision`, `decode`: as `choose_way` takes them."""
        self.device: Final = device
        self._precision: Final = precision
        self._decode: Final = decode
        self._proofs: Final = proofs
        self._cache: Final = cache
        self._attention: Final = attention
        self._batcher: Final = batcher
        self._decoder: Final = decoder
        self._decoded_ahead: Final = decoded_ahead
        self._models: dict[str, ServedModel] = {}
        self._loader: Final = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._loading: Final = asyncio.Lock()
        self.readying: Final = Readying()

    def close(self) -> None:
        """Ends the threads that load and make ready."""
        self.readying.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> list[engine_pb2.LoadedModel]:
        """All that serve."""
        return [model.describe() for model in self._models.values()]

    @contextmanager
    def use(self, key: str) -> Iterator[ServedModel]:
        """Holds a model for a request. `ModelStateError` when it is not loaded."""
        model = self._models.get(key)
        if model is None:
            loaded = ", ".join(self._models) or "none"
            raise ModelStateError(
                f"model {key!r} is not loaded in the engine (loaded: {loaded})", model=key, state="unloaded"
            )
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1
            if model.users == 0:
                model.unused.set()

    async def load(self, key: str, path: str) -> ServedModel:
        """Loads a folder and asks it a canary; then it serves. Loading the same again changes nothing.

        `ModelStateError`: the key is another folder's, or the model does not work. Errors of `load_exported`.
        """
        async with self._loading:
            present = self._models.get(key)
            if present is not None:
                if present.path == path:
                    return present
                raise ModelStateError(
                    f"model {key!r} is loaded from {present.path!r}, not {path!r}", model=key
                )
            began_s = time.perf_counter()
            loop = asyncio.get_running_loop()
            model = self._open(key, path, await loop.run_in_executor(self._loader, self._read, path))
            if model.towers.small:  # its vectors are the same to the last bit from the first one on
                await loop.run_in_executor(self._loader, model.towers.freeze)
            try:
                # The first forward is much slower than the others, which the batcher is to learn from.
                await self.ask_canary(model)
                model.images.cost, model.texts.cost = type(model.images.cost)(), type(model.texts.cost)()
                await self.ask_canary(model)
            except BaseException as error:
                self._close(model)
                if isinstance(error, InternalError):
                    raise ModelStateError(
                        f"the model at {path!r} does not work: {error.message}", model=key, state="broken"
                    ) from error
                raise
            model.load_seconds = time.perf_counter() - began_s
            self._models[key] = model
            if not model.towers.small:
                record = partial(self._batcher.on_device, model.towers.record_next, _PROBE_LIMIT_S)
                self.readying.begin(key, model.towers.freeze, record)
            _log.info("model %s is loaded", key, extra={"path": path, "seconds": model.load_seconds})
            return model

    async def unload(self, key: str) -> None:
        """Takes a model from new requests at once, waits for those that use it, and forgets it."""
        with self.use(key) as model:
            del self._models[key]
            model.unused.clear()
        if model.users:
            await model.unused.wait()
        await self.readying.end(key)
        self._close(model)
        _log.info("model %s is unloaded", key)

    async def canary(self) -> float:
        """One image and one text through every model, and something through the bare device. Its seconds.

        `InternalError` when an answer is wrong.
        """
        began_s = time.perf_counter()
        await self._batcher.on_device(self._probe, _PROBE_LIMIT_S)
        for key in list(self._models):
            if key in self._models:
                with self.use(key) as model:
                    await self.ask_canary(model)
        return time.perf_counter() - began_s

    async def ask_canary(self, model: ServedModel) -> None:
        """An image and a text, by the path of requests but before them."""
        caller = Caller.current()
        image_CHW = await self._decoder.image(model.sizes.usual.reader, _CANARY_IMAGE)
        (tokens_L,) = await self._decoder.texts(model.clip, [_CANARY_TEXT])
        if isinstance(tokens_L, CliptuneError):
            raise InternalError(f"the canary's text was refused: {tokens_L.message}")
        await asyncio.gather(
            self._batcher.submit(model.images, image_CHW, caller, shape=image_CHW.shape, urgent=True),
            self._batcher.submit(model.texts, tokens_L, caller, length=len(tokens_L), urgent=True),
        )

    def _open(self, key: str, path: str, read: _Read) -> ServedModel:
        towers = read.towers
        return ServedModel(
            key=key,
            path=path,
            clip=towers.clip,
            towers=towers,
            images=self._batcher.open(key, "image", towers.images, towers.stack),
            texts=self._batcher.open(key, "text", towers.texts, towers.stack),
            sizes=read.sizes,
            way=read.way,
            base=read.base,
            trained_dims=read.trained_dims,
            scores=Scores(towers.clip.similarity),
            decoded_ahead={bulk: asyncio.Semaphore(self._decoded_ahead) for bulk in (False, True)},
        )

    def _close(self, model: ServedModel) -> None:
        for lane in (model.images, model.texts):
            self._batcher.remove(lane)
            self._cache.forget((model.key, lane.tower))
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _read(self, path: str) -> _Read:
        loaded = [model.base for model in list(self._models.values())]
        clip = load_exported(Path(path), device=self.device, loaded=loaded)
        base = SharedBase(clip)
        make_lean(clip, choose_lean(clip))
        install(clip.model, self._attention)
        clip.model.eval()
        machine = detect(self.device)
        known = read_measured(Path(path), self.device, machine)
        way = choose_way(
            clip,
            machine,
            precision=self._precision,
            decode=self._decode,
            proofs=self._proofs,
            known=known,
        )
        if way.measured != known:
            write_measured(Path(path), self.device, machine, way.measured)
        # Folded kernels compute fp32; and an adapter's weights are not those of the tower that carries it.
        folds = way.precision.value == "fp32" and clip.adapter is None
        clip, folded = fold(clip) if folds else (clip, None)
        for choice in filter(None, (way.precision, way.decode, folded)):
            _log.info("%s = %s: %s", choice.subject, choice.value, choice.reason, extra={"path": path})
        told = (Path(path) / MANIFEST_FILE).is_file()
        manifest = read_manifest(Path(path)) if told else None
        sizes = ImageSizes(
            clip,
            serving=(manifest.serving_size if manifest else None) or clip.image_size,
            proven=manifest.proven_sizes if manifest else (),
            decode=way.decode.value,
        )
        return _Read(
            towers=Towers(clip, way.autocast(self.device), way.dtype, sizes.serving),
            base=base,
            way=way,
            trained_dims=manifest.matryoshka_dims if manifest else (),
            sizes=sizes,
        )

    def _probe(self) -> None:
        ones = torch.ones(8, 8, device=self.device)
        if float((ones @ ones).sum()) != 512.0:
            raise InternalError(f"the device {self.device} computes wrong results")
