"""A version as ModelService tells of it: what its manifest says, and what is so now.

Enters: a published version. Leaves: its message. Called by `models.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Protocol

from cliptune.errors import DeadlineExceededError, UnavailableError
from cliptune.internal.v1 import engine_pb2
from cliptune.v1 import model_pb2
from cliptune_server.catalog.loaded import LoadedModels
from cliptune_server.catalog.model_files import PublishedModel
from cliptune_server.catalog.registry import Reference


class Engines(Protocol):
    """What is needed of the engine supervisor."""

    def status(self) -> Awaitable[engine_pb2.StatusResponse]:
        """The engine's own word."""


async def look(catalog: LoadedModels, engines: Engines) -> None:
    """Learn how the engine serves its models now. While there is none, that is not known."""
    if not any(True for _ in catalog):
        return
    try:
        status = await engines.status()
    except (UnavailableError, DeadlineExceededError):
        catalog.ways = {}
        return
    catalog.ways = {
        loaded.key: model_pb2.ServedWay(
            precision=loaded.precision,
            precision_cosine=loaded.precision_cosine,
            decode=loaded.decode,
            decode_cosine=loaded.decode_cosine,
            towers=loaded.towers,
            towers_reason=loaded.towers_reason,
        )
        for loaded in status.models
    }


def message_of(model: PublishedModel, catalog: LoadedModels, device: str) -> model_pb2.Model:
    """`device`: of the engine."""
    loaded = model.key in catalog
    message = model_pb2.Model(
        name=model.name,
        version=model.version,
        aliases=catalog.aliases(model.name, model.version),
        loaded=loaded,
        bytes=model.bytes,
        architecture=model.architecture,
        embedding_dim=model.embedding_dim,
        image_size=model.image_size,
        job_id=model.job_id,
        metrics=model.metrics,
        similarity=model.similarity,
        similarity_parameters=model.similarity_values,
        serving_size=model.serving_size,
        sizes=[_proven(entry) for entry in model.sizes],
        path=str(model.path),
        device=device if loaded else "",
    )
    if loaded and (way := catalog.ways.get(model.key)) is not None:
        message.served.CopyFrom(way)
    for alias in message.aliases:
        if (traffic := catalog.traffic_of(Reference(name=model.name, alias=alias))).versions:
            message.traffic[alias].CopyFrom(traffic.message())
    message.created.FromDatetime(model.created)
    return message


def _proven(entry: Mapping[str, float]) -> model_pb2.ProvenSize:
    return model_pb2.ProvenSize(
        height=int(entry.get("height", 0)),
        width=int(entry.get("width", 0)),
        value=entry.get("value", 0.0),
        images_per_second=entry.get("images_per_second", 0.0),
        latency_ms=entry.get("latency_ms", 0.0),
        memory_bytes=int(entry.get("memory_bytes", 0)),
    )
