"""Which model an adapter belongs to: where it comes from, and a digest of its weights.

Enters: a source and the model built from it. Leaves: a `BaseIdentity`, kept in the adapter's file and
compared when the adapter is put over a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from cliptune.errors import InvalidInputError
from cliptune_model.source import ModelSource


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseIdentity:
    """A base.

    Attributes:
        source: builds it.
        seed: of random weights.
        sha256: of its weights, as `digest` has it. It alone decides; the source is how to find them.
    """

    source: ModelSource
    seed: int
    sha256: str

    @property
    def told(self) -> str:
        """For a person."""
        name = f"{self.source.name} {self.source.pretrained}".strip()
        return f"{name} (weights sha256 {self.sha256[:12]})"

    def to_values(self) -> dict[str, Any]:
        """As JSON values."""
        source = self.source
        return {
            "name": source.name,
            "pretrained": source.pretrained,
            "context_length": source.context_length,
            "patch_size": source.patch_size,
            "seed": self.seed,
            "sha256": self.sha256,
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_values`. `InvalidInputError`, KeyError or TypeError for anything else."""
        length, patch = values.get("context_length"), values.get("patch_size")
        sha256 = str(values["sha256"])
        if len(sha256) != 64:
            raise InvalidInputError(f"{sha256!r} is no digest of a base's weights")
        return cls(
            source=ModelSource(
                name=str(values["name"]),
                pretrained=str(values.get("pretrained") or ""),
                context_length=None if length is None else int(length),
                patch_size=None if patch is None else int(patch),
            ),
            seed=int(values.get("seed") or 0),
            sha256=sha256,
        )


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and contents of tensors, wherever and in whatever file they lie."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).numpy().data if tensor.numel() else b"")
    return total.hexdigest()
