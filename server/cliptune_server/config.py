"""What a daemon is told when it starts: read once, checked once, never changed.

Enters: values from the command line (`cli.py`) or a test. Leaves: a frozen `ServerConfig` that `daemon.py`
hands on in parts. A wrong value is reported as `InvalidInputError` with the value in it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cliptune.embedded import DEFAULT_MODEL, is_embedded
from cliptune.errors import InvalidInputError

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_GRPC_PORT: Final = 50051
DEFAULT_HTTP_PORT: Final = 8000
PRECISIONS: Final = ("default", "exact", "auto")
DECODES: Final = ("exact", "fast")
_DEVICE_RULE: Final = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may hold and how long a connection may be silent."""

    message_bytes: int = 256 * 1024 * 1024
    """Largest gRPC message or HTTP body, either way."""
    keepalive_s: float = 30.0
    """A gRPC connection this long without traffic is asked whether it still lives."""
    keepalive_min_ping_s: float = 5.0
    """A client that asks more often than this is dropped."""

    def __post_init__(self) -> None:
        if self.message_bytes < 1024 * 1024:
            raise InvalidInputError(
                f"limits.message_bytes is {self.message_bytes}; at least {1024 * 1024} are needed"
            )
        if self.keepalive_s <= 0 or self.keepalive_min_ping_s <= 0:
            raise InvalidInputError(
                f"keepalive times must be above 0 s, not {self.keepalive_s} and {self.keepalive_min_ping_s}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsConfig:
    """How jobs are run."""

    data_roots: tuple[Path, ...] = ()
    """Folders that jobs may read from, beside the home's own uploads and models."""
    max_preparing: int = 1
    """Preparations at a time: each reads data on the CPU."""
    cancel_grace_s: float = 60.0
    """A trainer that has not ended so long after a cancel is killed."""
    settle_s: float = 60.0
    """What a trainer that has said yes to a pause or a cancel may take to end before the caller is told."""

    def __post_init__(self) -> None:
        if self.max_preparing < 1:
            raise InvalidInputError(f"max_preparing must be at least 1, not {self.max_preparing}")
        if not (self.cancel_grace_s > 0 and self.settle_s > 0):
            raise InvalidInputError(
                f"cancel_grace_s and settle_s must be above 0, not {self.cancel_grace_s} and {self.settle_s}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetsConfig:
    """What uploaded data sets may take."""

    quota_bytes: int = 0
    """Of all together, with what uploads under way have announced. 0: no limit but the disk."""
    keep_uploads_s: float = 7 * 24 * 3600.0
    """An upload that nobody went on with for so long is removed."""

    def __post_init__(self) -> None:
        if self.quota_bytes < 0:
            raise InvalidInputError(f"the quota of data sets must not be negative, and is {self.quota_bytes}")
        if self.keep_uploads_s <= 0:
            raise InvalidInputError(f"keep_uploads_s must be above 0, not {self.keep_uploads_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """One daemon."""

    home: Path
    """Folder with all of its state."""
    host: str = DEFAULT_HOST
    """Address to listen on; "0.0.0.0" opens it to the network, which has no authentication."""
    grpc_port: int = DEFAULT_GRPC_PORT
    """0: any free port."""
    http_port: int = DEFAULT_HTTP_PORT
    """0: any free port."""
    device: str = "auto"
    """Device of the engine: "auto", "cpu", "mps", "cuda" or "cuda:N"."""
    threads: int | None = None
    """CPU threads of the engine. None: it chooses."""
    standby: bool = True
    """Keep a second engine process ready, so that a dead one is replaced in a second rather than in ten."""
    precision: str = "default"
    """Of inference: "exact", "auto", or "default", which is exact on a CPU and auto elsewhere."""
    decode: str = "exact"
    """Of JPEG files: "exact" or "fast"."""
    embedding_cache_bytes: int = 64 * 1024 * 1024
    """Embeddings that the engine remembers by their item's content. 0: none."""
    yield_to_inference: bool = True
    """Ask trainers on the engine's accelerator to stand still while requests are in flight."""
    data_roots: tuple[Path, ...] = ()
    """Folders that jobs may read from, beside the home's own uploads and models."""
    code_folders: tuple[Path, ...] = ()
    """Folders whose Python files jobs may name as a loss or a similarity: whoever may write there runs code
    as this daemon's user."""
    image_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from by their address: "images.example.com", "*.example.com"."""
    private_image_hosts: bool = False
    """They may have addresses that are not public."""
    grace_s: float = 30.0
    """Time that a stop gives to calls in flight and to trainers that checkpoint."""
    default_model: str = DEFAULT_MODEL
    """Embedded model that is served while nothing else is. Empty: none."""
    log_level: str = "info"
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, port in (("gRPC", self.grpc_port), ("HTTP", self.http_port)):
            if not 0 <= port <= 65535:
                raise InvalidInputError(f"the {name} port must be 0 to 65535, not {port}", port=port)
        if self.grpc_port and self.grpc_port == self.http_port:
            raise InvalidInputError(f"gRPC and HTTP cannot share port {self.grpc_port}", port=self.grpc_port)
        if not self.host:
            raise InvalidInputError("the host is empty; 127.0.0.1 listens on this machine alone")
        if not _DEVICE_RULE.fullmatch(self.device):
            allowed = "auto, cpu, mps, cuda, cuda:N"
            raise InvalidInputError(f"device {self.device!r} is none of {allowed}", allowed=allowed)
        if self.threads is not None and self.threads < 1:
            raise InvalidInputError(f"threads must be at least 1, not {self.threads}")
        if self.default_model and not is_embedded(self.default_model):
            raise InvalidInputError(
                f"{self.default_model!r} cannot be served by default; allowed: {DEFAULT_MODEL}, none",
                allowed=f"{DEFAULT_MODEL}, none",
            )
        for name, value, all_of in (
            ("precision", self.precision, PRECISIONS),
            ("decode", self.decode, DECODES),
        ):
            if value not in all_of:
                allowed = ", ".join(all_of)
                raise InvalidInputError(f"{name} {value!r} is none of {allowed}", allowed=allowed)
        if self.embedding_cache_bytes < 0:
            raise InvalidInputError(
                f"the embedding cache must not be below 0 bytes, and is {self.embedding_cache_bytes}"
            )
        if self.grace_s < 0:
            raise InvalidInputError(f"grace_s must not be negative, and is {self.grace_s}")
        object.__setattr__(self, "home", self.home.expanduser().absolute())
        object.__setattr__(self, "data_roots", tuple(_folder("data root", root) for root in self.data_roots))
        if any(os.pathsep in str(folder) for folder in self.code_folders):
            raise InvalidInputError(f"a code folder's path holds {os.pathsep!r}: {self.code_folders}")
        object.__setattr__(
            self, "code_folders", tuple(_folder("code folder", one) for one in self.code_folders)
        )


def _folder(what: str, path: Path) -> Path:
    resolved = path.expanduser().resolve()
    if not resolved.is_dir():
        raise InvalidInputError(f"the {what} {path} is not a folder", path=path)
    return resolved
