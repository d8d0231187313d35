"""A published model as the user sees it: a frozen dataclass over `cliptune.v1.Model`."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from cliptune.v1 import model_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvenSize:
    """An image size that a model was measured at."""

    height: int
    width: int
    value: float
    """The main metric."""
    images_per_second: float
    latency_ms: float
    """One image through the image tower, on the machine that trained it."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One published version. It never changes; its aliases and whether it is loaded do."""

    name: str
    version: int
    aliases: tuple[str, ...]
    loaded: bool
    created: datetime | None
    bytes: int
    architecture: str
    embedding_dim: int
    image_size: int
    """Height and width in pixels."""
    job_id: str
    metrics: dict[str, float]
    path: str
    """Folder in open_clip's own format, on the daemon's machine."""
    device: str
    """Where it is loaded. Empty: nowhere."""
    similarity: str
    """How alike embeddings are: "cosine", unless it was trained with another."""
    similarity_parameters: dict[str, float]
    """What the similarity computes with, given or learned."""
    serving_size: int
    """Side of images, in pixels, where a request asks for none."""
    sizes: tuple[ProvenSize, ...]
    """Those that it was measured at after training, the smallest first; a request may ask for any of them."""
    message: model_pb2.Model = field(repr=False, compare=False)

    @property
    def reference(self) -> str:
        """ "NAME:VERSION", as calls take it."""
        return f"{self.name}:{self.version}"


def model_from_message(message: model_pb2.Model) -> Model:
    """The view of a `Model`."""
    return Model(
        name=message.name,
        version=message.version,
        aliases=tuple(message.aliases),
        loaded=message.loaded,
        created=message.created.ToDatetime(tzinfo=UTC) if message.HasField("created") else None,
        bytes=message.bytes,
        architecture=message.architecture,
        embedding_dim=message.embedding_dim,
        image_size=message.image_size,
        job_id=message.job_id,
        metrics=dict(message.metrics),
        path=message.path,
        device=message.device,
        similarity=message.similarity,
        similarity_parameters=dict(message.similarity_parameters),
        serving_size=message.serving_size,
        sizes=tuple(
            ProvenSize(
                height=size.height,
                width=size.width,
                value=size.value,
                images_per_second=size.images_per_second,
                latency_ms=size.latency_ms,
                memory_bytes=size.memory_bytes,
            )
            for size in message.sizes
        ),
        message=message,
    )
