"""Inference calls as values.

Pure, as `codec.py`; items that fail are treated by the rule of `items.py`.

Legend: N images, texts or pairs; M texts; C classes; D embedding dimension.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from cliptune.codec import Call
from cliptune.errors import (
    CliptuneError,
    ImageDecodeError,
    ImageSizeError,
    InvalidInputError,
    TensorError,
    TextError,
)
from cliptune.images import ImageInput, image_message
from cliptune.items import OnError, failed_items, gather, many_of, placed, scatter, settle, text_item
from cliptune.results import Classifications, Embeddings, FailedItem, Float32, PairScores, Profile, Similarity
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, spec_pb2, tensor_pb2

Resolution: TypeAlias = str | int | tuple[int, int]
ClassesInput: TypeAlias = Mapping[str, str | Sequence[str]] | Sequence[str | spec_pb2.ClassPrompts]

# One request of a long list: enough to fill the engine's batches, small enough to be answered soon.
MAX_ITEMS: Final = 64
MAX_BYTES: Final = 32 * 1024 * 1024
# A request of one item fails with the item's own status.
ITEM_ERRORS: Final = (ImageDecodeError, ImageSizeError, TextError, TensorError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one request of a long list brought."""

    places: tuple[int, ...]
    vectors: Float32 | None
    """[len(places), D]."""
    model: str
    failed: tuple[FailedItem, ...]
    profile: Profile | None = None


class EmbedPlan:
    """A list of any length, embedded in requests of bounded size, one after another.

    The client carries out each of `calls` before it asks for the next: items are read only then, and all
    requests after the first ask for the version that answered it, so that a swap of an alias in between
    cannot mix two models' vectors in one array.
    """

    def __init__(
        self,
        kind: Literal["images", "texts"],
        items: object,
        model: str,
        on_error: OnError,
        dimensions: int | None = None,
        resolution: Resolution = "",
    ) -> None:
        self._kind: Final = kind
        self._items: Final = many_of(items, kind)
        self._convert: Final[Callable[[Any], Any]] = image_message if kind == "images" else text_item
        self._model = model
        self._on_error: Final = on_error
        self._dimensions: Final = dimensions or 0
        self._resolution: Final = resolution_text(resolution)
        self._failed: list[FailedItem] = []
        if not self._items:
            raise InvalidInputError(f"{kind} is empty", field=kind)

    def calls(self) -> Iterator[Call[Part]]:
        """The requests, each made when asked for."""
        messages: list[Any] = []
        places: list[int] = []
        size_bytes = 0
        for index, item in enumerate(self._items):
            try:
                message = self._convert(item)
            except CliptuneError as error:
                self._failed.append(self._refused(index, error))
                continue
            item_bytes = _size_bytes(message)
            if messages and (len(messages) == MAX_ITEMS or size_bytes + item_bytes > MAX_BYTES):
                yield self._call(messages, tuple(places))
                messages, places, size_bytes = [], [], 0
            messages.append(message)
            places.append(index)
            size_bytes += item_bytes
        if messages:
            yield self._call(messages, tuple(places))

    def recover(self, call: Call[Part], error: CliptuneError) -> Part:
        """What to make of a request that failed: an item that failed alone, or an error to raise."""
        if not call.item_field or not isinstance(error, ITEM_ERRORS):
            raise error
        return Part(
            places=(call.item_index,),
            vectors=None,
            model="",
            failed=(self._refused(call.item_index, error),),
        )

    def join(self, parts: Sequence[Part]) -> Embeddings:
        """All parts as one array [N, D]."""
        failed = sorted(
            (*self._failed, *(item for part in parts for item in part.failed)), key=lambda item: item.index
        )
        answered = [part for part in parts if part.vectors is not None]
        if not answered or len(failed) == len(self._items):
            raise placed(failed[0], count=len(failed), total=len(self._items))
        first = answered[0].vectors
        vectors = np.full((len(self._items), first.shape[1] if first is not None else 0), np.nan, np.float32)
        for part in answered:
            vectors[list(part.places)] = part.vectors
        profiles = [part.profile for part in parts if part.profile is not None]
        profile = functools.reduce(operator.add, profiles) if profiles else None
        return Embeddings.of(vectors, model=answered[0].model, errors=tuple(failed), profile=profile)

    def _call(self, messages: list[Any], places: tuple[int, ...]) -> Call[Part]:
        began_s = time.perf_counter()

        def parse(answer: Any) -> Part:
            self._model = answer.model or self._model
            failed = tuple(failed_items(answer.errors, {self._kind: places}))
            if failed and self._on_error == "raise":
                raise placed(failed[0], count=len(failed), total=len(self._items))
            return Part(
                places=places,
                vectors=unpack(answer.embeddings),
                model=answer.model,
                failed=failed,
                profile=_profile(answer, began_s),
            )

        images = self._kind == "images"
        request: inference_pb2.EmbedImagesRequest | inference_pb2.EmbedTextsRequest
        if images:
            request = inference_pb2.EmbedImagesRequest(
                model=self._model,
                images=messages,
                dimensions=self._dimensions,
                resolution=self._resolution,
            )
        else:
            request = inference_pb2.EmbedTextsRequest(
                model=self._model, texts=messages, dimensions=self._dimensions
            )
        return Call(
            method=f"InferenceService/{'EmbedImages' if images else 'EmbedTexts'}",
            request=request,
            answer=inference_pb2.EmbedImagesResponse if images else inference_pb2.EmbedTextsResponse,
            parse=parse,
            item_field=self._kind if len(messages) == 1 else "",
            item_index=places[0],
        )

    def _refused(self, index: int, error: CliptuneError) -> FailedItem:
        item = FailedItem(field=self._kind, index=index, error=error)
        if self._on_error == "raise":
            raise placed(item, count=1, total=len(self._items)) from error
        return item


def similarity(
    images: object, texts: object, model: str, on_error: OnError, resolution: Resolution = ""
) -> Call[Similarity]:
    """Every image against every text, [N, M]."""
    began_s = time.perf_counter()
    rows = gather("images", images, image_message, on_error)
    columns = gather("texts", texts, text_item, on_error)

    def parse(answer: inference_pb2.SimilarityResponse) -> Similarity:
        failed = settle(answer.errors, on_error, rows, columns)
        scores = scatter(scatter(unpack(answer.scores), rows).T, columns).T
        return Similarity(
            scores=scores,
            logit_scale=answer.logit_scale,
            model=answer.model,
            errors=failed,
            profile=_profile(answer, began_s),
        )

    return Call(
        method="InferenceService/Similarity",
        request=inference_pb2.SimilarityRequest(
            model=model,
            images=rows.messages,
            texts=columns.messages,
            resolution=resolution_text(resolution),
        ),
        answer=inference_pb2.SimilarityResponse,
        parse=parse,
    )


def score_pairs(
    pairs: Iterable[tuple[ImageInput, str]], model: str, on_error: OnError, resolution: Resolution = ""
) -> Call[PairScores]:
    """Image i against text i, [N]."""
    began_s = time.perf_counter()

    def pair_message(pair: tuple[ImageInput, str]) -> inference_pb2.ImageTextPair:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidInputError(f"a pair is (image, text), not {type(pair).__name__}")
        return inference_pb2.ImageTextPair(image=image_message(pair[0]), text=text_item(pair[1]))

    rows = gather("pairs", pairs, pair_message, on_error)

    def parse(answer: inference_pb2.ScorePairsResponse) -> PairScores:
        failed = settle(answer.errors, on_error, rows)
        return PairScores(
            scores=scatter(unpack(answer.scores), rows),
            logit_scale=answer.logit_scale,
            model=answer.model,
            errors=failed,
            profile=_profile(answer, began_s),
        )

    return Call(
        method="InferenceService/ScorePairs",
        request=inference_pb2.ScorePairsRequest(
            model=model, pairs=rows.messages, resolution=resolution_text(resolution)
        ),
        answer=inference_pb2.ScorePairsResponse,
        parse=parse,
    )


def classify(
    images: object, classes: ClassesInput, model: str, on_error: OnError, resolution: Resolution = ""
) -> Call[Classifications]:
    """Softmax over the classes for each image, [N, C]."""
    began_s = time.perf_counter()
    rows = gather("images", images, image_message, on_error)

    def parse(answer: inference_pb2.ClassifyResponse) -> Classifications:
        failed = settle(answer.errors, on_error, rows)
        return Classifications(
            labels=tuple(answer.labels),
            probabilities=scatter(unpack(answer.probabilities), rows),
            scores=scatter(unpack(answer.scores), rows),
            model=answer.model,
            errors=failed,
            profile=_profile(answer, began_s),
        )

    return Call(
        method="InferenceService/Classify",
        request=inference_pb2.ClassifyRequest(
            model=model,
            images=rows.messages,
            classes=class_messages(classes),
            resolution=resolution_text(resolution),
        ),
        answer=inference_pb2.ClassifyResponse,
        parse=parse,
    )


def class_messages(classes: ClassesInput) -> list[spec_pb2.ClassPrompts]:
    """Labels, or labels with their prompts, as messages."""
    if isinstance(classes, str):
        raise InvalidInputError("classes is one text, not a list of labels", field="classes")
    if isinstance(classes, Mapping):
        return [
            spec_pb2.ClassPrompts(
                label=text_item(label),
                prompts=[text_item(p) for p in ([prompts] if isinstance(prompts, str) else prompts)],
            )
            for label, prompts in classes.items()
        ]
    return [
        group if isinstance(group, spec_pb2.ClassPrompts) else spec_pb2.ClassPrompts(label=text_item(group))
        for group in classes
    ]


def resolution_text(resolution: Resolution) -> str:
    """As the contract writes it: "", a word, "224" or "224x320"; a side, or (height, width)."""
    if isinstance(resolution, str):
        return resolution
    sides = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    if not 1 <= len(sides) <= 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InvalidInputError(
            f"resolution is {resolution!r}; allowed: pixels, (height, width), fast, balanced, best",
            path="resolution",
            allowed="fast, balanced, best",
        )
    return "x".join(map(str, sides))


def _profile(answer: Any, began_s: float) -> Profile | None:
    """None from a daemon that tells none."""
    return Profile.of(answer.profile, time.perf_counter() - began_s) if answer.HasField("profile") else None


def _size_bytes(message: tensor_pb2.Image | str) -> int:
    if isinstance(message, str):
        return len(message)
    return len(message.encoded) or len(message.pixels.data)
