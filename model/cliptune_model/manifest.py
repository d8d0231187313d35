"""The manifest of an exported model: what is known of it beyond open_clip's own files.

Enters: `cliptune.json`, or what export knows. Leaves: a `Manifest`. Called by export and load; the
daemon's catalog reads the same JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from cliptune.errors import InvalidInputError, ModelNotFoundError
from cliptune_model.proven_sizes import ProvenSize
from cliptune_model.similarity import DEFAULT

FORMAT_VERSION: Final = 2  # 1: the similarity is always the cosine
MANIFEST_FILE: Final = "cliptune.json"
SIMILARITY_FILE: Final = "cliptune_similarity.safetensors"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What is known of an exported model beyond open_clip's own files. Plain JSON under these names.

    Attributes:
        architecture: open_clip's name, or "custom".
        embedding_dim: D.
        image_size: (height, width) in pixels.
        context_length: tokens of a text.
        similarity: name of the similarity that it was trained with, and is evaluated and served with.
        similarity_parameters: those that were given; what is learned lies in `SIMILARITY_FILE`.
        similarity_values: what it computes with, given or learned, for a person and for clients.
        similarity_sha256: of the file of a user's own similarity.
        weights_sha256: of the weights file, compared when they are loaded. Empty: not compared.
        matryoshka_dims: fewer dimensions that it was trained to be cut to, ascending.
        precision: of training: "fp32", "bf16" or "fp16". The weights are fp32.
        job_id: the job that trained it. Empty: none.
        metrics: evaluation after training, by name.
        serving_size: (height, width) where a request asks for none. None: `image_size`.
        proven_sizes: those that it was measured at after training, the smallest first.
        guard: which point between starting and trained weights it is: "share" of the way, "domain_gain",
            "general_loss", "tolerance", "ema_decay". Empty: the trained weights, unguarded.
        created: ISO 8601, UTC.
    """

    architecture: str
    embedding_dim: int
    image_size: tuple[int, int]
    context_length: int
    similarity: str = DEFAULT
    similarity_parameters: Mapping[str, float] = field(default_factory=dict)
    similarity_values: Mapping[str, float] = field(default_factory=dict)
    similarity_sha256: str = ""
    weights_sha256: str = ""
    matryoshka_dims: tuple[int, ...] = ()
    precision: str = "fp32"
    job_id: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    serving_size: tuple[int, int] | None = None
    proven_sizes: tuple[ProvenSize, ...] = ()
    guard: Mapping[str, float] = field(default_factory=dict)
    created: str = field(default_factory=_now)
    cliptune_version: str = field(default_factory=lambda: version("cliptune"))
    torch_version: str = field(default_factory=lambda: version("torch"))
    open_clip_version: str = field(default_factory=lambda: version("open_clip_torch"))
    format_version: int = 1

    def to_json(self) -> str:
        """Text of `cliptune.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`; fields that a newer cliptune has added are passed over.

        Raises:
            InvalidInputError: not a manifest, or of a newer format.
        """
        try:
            values = json.loads(text)
            found = int(values["format_version"])
            if found > FORMAT_VERSION:
                raise InvalidInputError(
                    f"the model has format {found}; this cliptune reads up to {FORMAT_VERSION}: upgrade it"
                )
            known = {item.name for item in dataclasses.fields(cls)}
            height, width = values["image_size"]
            kept = {key: value for key, value in values.items() if key in known}
            kept["image_size"] = (int(height), int(width))
            kept["matryoshka_dims"] = tuple(map(int, values.get("matryoshka_dims", ())))
            kept["proven_sizes"] = tuple(_proven(one) for one in values.get("proven_sizes", ()))
            if serving := values.get("serving_size"):
                kept["serving_size"] = (int(serving[0]), int(serving[1]))
            return cls(**kept)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{MANIFEST_FILE} is damaged: {error!r}") from error


def _proven(values: Mapping[str, Any]) -> ProvenSize:
    known = {item.name for item in dataclasses.fields(ProvenSize)}
    return ProvenSize(**{key: value for key, value in values.items() if key in known})


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an exported model.

    Raises:
        ModelNotFoundError: no such folder, or it has no manifest.
        InvalidInputError: the manifest is damaged or of a newer format.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(
            f"no exported model at {str(directory)!r}: {MANIFEST_FILE} is missing"
        ) from error
