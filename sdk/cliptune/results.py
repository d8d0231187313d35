"""What inference answers: numpy arrays that also say which model answered and which items failed.

Made by `codec.py` from messages, handed to the user by both clients.

Legend: N images (or texts, or pairs), M texts, C classes, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cliptune.errors import CliptuneError
from cliptune.v1 import inference_pb2

Float32 = npt.NDArray[np.float32]


class Health(StrEnum):
    """What the daemon says of itself, by grpc.health.v1."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedItem:
    """An item that failed while its neighbours were answered; its row is NaN."""

    field: str
    """Which list it was in: "images", "texts" or "pairs"."""
    index: int
    """Its place in that list."""
    error: CliptuneError


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Where the time of a call went, in seconds.

    Stages of different items overlap, so they need not add up. Of a list that went out in several requests,
    one after another, the sum.
    """

    total_s: float
    """As the caller saw it: the message made, sent, answered."""
    daemon_s: float
    """In the daemon, the engine included."""
    engine_s: float
    """In the engine, from the request's arrival to its answer."""
    decode_s: float
    """Until the last item was decoded or tokenised."""
    queue_s: float
    """The longest that an item waited for its batch."""
    forward_s: float
    """The longest forward that an item was in."""
    batch_items: int
    """The most items that shared a forward with one of these."""
    cached_items: int
    """Answered from the cache: neither decoded nor forwarded."""

    @property
    def transport_s(self) -> float:
        """Neither in the daemon nor below it: the message made, the network, the answer read."""
        return max(0.0, self.total_s - self.daemon_s)

    @classmethod
    def of(cls, message: inference_pb2.Profile, total_s: float) -> Self:
        """From an answer, and what the caller measured."""
        return cls(
            total_s=total_s,
            daemon_s=message.daemon_seconds,
            engine_s=message.engine_seconds,
            decode_s=message.decode_seconds,
            queue_s=message.queue_seconds,
            forward_s=message.forward_seconds,
            batch_items=message.batch_items,
            cached_items=message.cached_items,
        )

    def __add__(self, other: Profile) -> Profile:
        return Profile(
            total_s=self.total_s + other.total_s,
            daemon_s=self.daemon_s + other.daemon_s,
            engine_s=self.engine_s + other.engine_s,
            decode_s=self.decode_s + other.decode_s,
            queue_s=self.queue_s + other.queue_s,
            forward_s=self.forward_s + other.forward_s,
            batch_items=max(self.batch_items, other.batch_items),
            cached_items=self.cached_items + other.cached_items,
        )


class Embeddings(np.ndarray[Any, np.dtype[np.float32]]):
    """An array [N, D] of float32 that also knows what made it.

    Its rows are what the model's similarity is a formula of: of unit length for the cosine.

    `model` is the version that answered ("NAME:VERSION"), `errors` the items that failed (only with
    on_error="return"), `profile` where the time went (not of a stream). Arrays made from it by numpy carry
    none of these.
    """

    model: str
    errors: tuple[FailedItem, ...]
    profile: Profile | None

    @classmethod
    def of(
        cls,
        vectors: Float32,
        *,
        model: str,
        errors: tuple[FailedItem, ...] = (),
        profile: Profile | None = None,
    ) -> Self:
        """The same memory, with what is known about it."""
        array = np.asarray(vectors, dtype=np.float32).view(cls)
        array.model, array.errors, array.profile = model, errors, profile
        return array

    def __array_finalize__(self, source: object) -> None:
        self.model, self.errors, self.profile = "", (), None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Similarity:
    """Every image against every text."""

    scores: Float32
    """[N, M], the model's similarity."""
    logit_scale: float
    """What the model multiplies similarities by before a softmax."""
    model: str
    errors: tuple[FailedItem, ...] = ()
    profile: Profile | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairScores:
    """Image i against text i."""

    scores: Float32
    """[N], the model's similarity."""
    logit_scale: float
    model: str
    errors: tuple[FailedItem, ...] = ()
    profile: Profile | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """What one image is."""

    label: str
    """The likeliest class. Empty when the image failed."""
    probability: float
    """Of that class, 0 to 1. NaN when the image failed."""
    probabilities: dict[str, float]
    """Of every class, the likeliest first."""
    scores: dict[str, float]
    """Similarity to every class, in the same order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Classifications:
    """What each image is: a sequence of `Classification`, over the matrices they come from."""

    labels: tuple[str, ...]
    """Names of the C columns."""
    probabilities: Float32
    """[N, C], softmax over the classes."""
    scores: Float32
    """[N, C], similarity to each class."""
    model: str
    errors: tuple[FailedItem, ...] = ()
    profile: Profile | None = None

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, index: int) -> Classification:
        row, scores = self.probabilities[index], self.scores[index]
        if np.isnan(row).any():
            nothing = dict.fromkeys(self.labels, float("nan"))
            return Classification(label="", probability=float("nan"), probabilities=nothing, scores=nothing)
        order = np.argsort(-row, kind="stable")
        return Classification(
            label=self.labels[order[0]],
            probability=float(row[order[0]]),
            probabilities={self.labels[column]: float(row[column]) for column in order},
            scores={self.labels[column]: float(scores[column]) for column in order},
        )

    def __iter__(self) -> Iterator[Classification]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedded:
    """One answer of a bulk embedding."""

    index: int
    """Place of the item in the input."""
    vector: Float32 | None
    """[D]. None when the item failed."""
    error: CliptuneError | None = None
    model: str = ""
