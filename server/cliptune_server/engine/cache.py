"""Embeddings that are remembered by what was embedded: the same bytes are decoded and forwarded once.

Enters: items as they came, before anything is decoded. Leaves: their features, if this version of the model
computed them before. One cache for all models of an engine, bounded in bytes; what was used least recently is
forgotten first. Asked by `inference.py` for every item; a model that is unloaded takes its rows with it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from cliptune.errors import InvalidInputError
from cliptune_server.engine.payload import Picture

DEFAULT_BYTES: Final = 64 * 1024 * 1024
_DIGEST_BYTES: Final = 16
# What an entry costs beside its numbers: key, digest, array header, links.
_ENTRY_BYTES: Final = 400

Vector = npt.NDArray[np.float32]
Key = tuple[Hashable, bytes]


class EmbeddingCache:
    """Features [D] by content. Used on the event loop."""

    def __init__(self, limit_bytes: int = DEFAULT_BYTES) -> None:
        """`limit_bytes` 0: nothing is remembered."""
        if limit_bytes < 0:
            raise InvalidInputError(f"the cache's size must not be below 0, and is {limit_bytes}")
        self._limit_bytes: Final = limit_bytes
        self._rows: OrderedDict[Key, Vector] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    @property
    def on(self) -> bool:
        """Whether anything is remembered at all."""
        return self._limit_bytes > 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, owner: Hashable, digest: bytes) -> Vector | None:
        """[D], or None when it is not remembered. `owner`: the model and what else the features depend on."""
        row_D = self._rows.get((owner, digest))
        if row_D is None:
            self.misses += 1
            return None
        self.hits += 1
        self._rows.move_to_end((owner, digest))
        return row_D

    def put(self, owner: Hashable, digest: bytes, row_D: Vector) -> None:
        """Remembers features, and forgets others to make room."""
        key = (owner, digest)
        if not self.on or key in self._rows:
            return
        # A copy: a row of a batch would keep the whole batch.
        self._rows[key] = row_D.copy()
        self.bytes += _bytes(row_D)
        while self.bytes > self._limit_bytes:
            _, oldest_D = self._rows.popitem(last=False)
            self.bytes -= _bytes(oldest_D)

    def forget(self, owner: Hashable) -> None:
        """What a model computed, when it is unloaded."""
        for key in [key for key in self._rows if key[0] == owner]:
            self.bytes -= _bytes(self._rows.pop(key))


def image_digests(images: Sequence[Picture]) -> list[bytes]:
    """Of each image as it was sent: files by their bytes, pixels with type and shape. Takes 1 s for a GB."""
    return [_image_digest(image) for image in images]


def text_digests(texts: Sequence[str]) -> list[bytes]:
    """Of each text."""
    return [
        hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES, person=b"t"
        ).digest()
        for text in texts
    ]


def _image_digest(image: Picture) -> bytes:
    if image.pixels is None:
        return hashlib.blake2b(image.data, digest_size=_DIGEST_BYTES, person=b"f").digest()
    found = hashlib.blake2b(image.data, digest_size=_DIGEST_BYTES, person=b"p")
    found.update(repr((image.pixels.dtype, list(image.pixels.shape))).encode())
    return found.digest()


def _bytes(row_D: Vector) -> int:
    return int(row_D.nbytes) + _ENTRY_BYTES
