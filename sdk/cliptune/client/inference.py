"""Inference, synchronously: embeddings and what follows from them. Part of `Client`."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import cliptune.bulk as bulk
import cliptune.bulk_feed as bulk_feed
import cliptune.inference_codec as inference_codec
from cliptune.client.connection import Connection
from cliptune.errors import CliptuneError
from cliptune.images import ImageInput
from cliptune.inference_codec import ClassesInput, EmbedPlan, Resolution
from cliptune.items import OnError
from cliptune.progress import bulk_bar
from cliptune.results import Classifications, Embedded, Embeddings, PairScores, Similarity
from cliptune.v1 import inference_pb2


class InferenceCalls(Connection):
    """InferenceService."""

    def embed_images(
        self,
        images: Sequence[ImageInput],
        *,
        model: str = "",
        resolution: Resolution = "",
        dimensions: int | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Unit vectors [N, D], float32, of images: paths, bytes, Pillow, numpy or torch (`image_message`).

        Long lists go out in several requests, all answered by one version of the model. A failed item raises
        its own error, with `index` in its metadata; with on_error="return" its row is NaN and `.errors` lists
        it. `dimensions`: the first so many numbers of each, of a model that was trained for it.
        `resolution`: a side or (height, width) in pixels, or "fast", "balanced" or "best" of the sizes that
        the model was measured at (`Model.sizes`); else its serving size. `.profile` says where the time went.
        """
        return self._embed(EmbedPlan("images", images, model, on_error, dimensions, resolution), timeout_s)

    def embed_texts(
        self,
        texts: Sequence[str],
        *,
        model: str = "",
        dimensions: int | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Unit vectors [N, D], float32, of texts. Long lists and failed items: as `embed_images`."""
        return self._embed(EmbedPlan("texts", texts, model, on_error, dimensions), timeout_s)

    def similarity(
        self,
        images: Sequence[ImageInput],
        texts: Sequence[str],
        *,
        model: str = "",
        resolution: Resolution = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Similarity:
        """Every image against every text, `scores` [N, M]."""
        return self._run(inference_codec.similarity(images, texts, model, on_error, resolution), timeout_s)

    def score_pairs(
        self,
        pairs: Iterable[tuple[ImageInput, str]],
        *,
        model: str = "",
        resolution: Resolution = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> PairScores:
        """Image i against text i, `scores` [N]."""
        return self._run(inference_codec.score_pairs(pairs, model, on_error, resolution), timeout_s)

    def classify(
        self,
        images: Sequence[ImageInput],
        classes: ClassesInput,
        *,
        model: str = "",
        resolution: Resolution = "",
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Classifications:
        """Zero-shot classification: one `Classification` for each image.

        `classes`: labels, or label → prompts (averaged); a label alone is read as "a photo of a {label}".
        """
        return self._run(inference_codec.classify(images, classes, model, on_error, resolution), timeout_s)

    def embed_stream(
        self,
        items: Iterable[Any],
        kind: bulk.Kind,
        *,
        model: str = "",
        resolution: Resolution = "",
        on_error: OnError = "raise",
        max_in_flight: int = bulk.DEFAULT_IN_FLIGHT,
    ) -> Generator[Embedded]:
        """Embed any number of "images" or "texts" over one stream; answers in the order of the input.

        Items are read as they are needed and at most `max_in_flight` are under way. A lost stream is taken up
        again with what is unanswered.
        """
        window = bulk.BulkWindow(kind, model, max_in_flight, on_error, resolution)

        def open_stream(requests: Iterator[Any]) -> Generator[Any]:
            return self._open(bulk.METHOD, requests, inference_pb2.EmbedStreamResponse).answers()

        return bulk_feed.embed_stream(window, items, open_stream)

    def embed_many(
        self,
        items: Iterable[Any],
        kind: bulk.Kind = "images",
        *,
        model: str = "",
        resolution: Resolution = "",
        on_error: OnError = "raise",
        max_in_flight: int = bulk.DEFAULT_IN_FLIGHT,
        progress: bool = False,
    ) -> Embeddings:
        """All of `embed_stream` as one array [N, D]. `progress`: show a bar on stderr."""
        collected = bulk.Collected(kind)
        stream = self.embed_stream(
            items,
            kind,
            model=model,
            resolution=resolution,
            on_error=on_error,
            max_in_flight=max_in_flight,
        )
        with bulk_bar(kind, items, shown=progress) as advance, closing(stream):
            for embedded in stream:
                collected.add(embedded)
                advance()
        return collected.embeddings()

    def _embed(self, plan: EmbedPlan, timeout_s: float | None) -> Embeddings:
        parts = []
        for call in plan.calls():
            try:
                parts.append(self._run(call, timeout_s))
            except CliptuneError as error:
                parts.append(plan.recover(call, error))
        return plan.join(parts)
