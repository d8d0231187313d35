"""The gradient of a contrastive batch that does not fit: exactly that of the whole batch, a part at a time.

Enters: a batch, of any size. Leaves: gradients in the parameters, and the loss. Called by the step.

Gao et al. 2021 (GradCache), section 3.2: (1) all parts but the last go through the towers without a graph
and leave their features; (2) the loss over all features gives the gradient of each; (3) each part goes
through its tower again, with a graph, and takes up the gradient of its features. The loss sees the batch as
it is, so logit scale and bias get their gradient once, and every loss works.

Three things keep the price down. The last part of each tower keeps its graph from the first pass, so k parts
need k-1 replays; a batch of one part is an ordinary step. A tower without trained parameters is not replayed.
Where towers draw nothing at random, what has no graph goes through in larger parts, and texts are replayed in
larger ones, since images leave them their room (`larger_parts`). The extra cost of k parts is (k-1)/k of a
forward pass, about a third of that of the step.

b: pairs of a part, N: pairs of the batch as the loss sees them, D: embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses import Identities, Teacher
from cliptune_trainer.losses.objective import Features, Objective
from cliptune_trainer.steps.batch_norm import BatchNorms
from cliptune_trainer.steps.half_weights import HalfWeights
from cliptune_trainer.steps.larger_parts import Larger, joined
from cliptune_trainer.steps.parts import moved, parts_of
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.replay import RandomState
from cliptune_trainer.steps.teacher import StartingModel


class FeatureCache:
    """One tower's features of a batch: those of the early parts as leaves, of the last part with its graph.

    Args:
        encode: rows of the batch → features [b, D], fp32, not normalised.
        parts: the rows, in order; the last part keeps its graph.
        device: of the tower.
        without_graph: times a part's length that goes through at once without a graph.
        replayed: the same of the replay.
    """

    def __init__(
        self,
        encode: Callable[[slice], Tensor],
        parts: Sequence[slice],
        device: torch.device,
        *,
        without_graph: int = 1,
        replayed: int = 1,
    ) -> None:
        self._encode, self._device = encode, device
        self._early, self._last = parts[:-1], parts[-1]
        self._without_graph, self._replayed = without_graph, replayed
        # What is replayed, and the generators before it went through the tower; None: nothing is drawn.
        self._replays: list[tuple[slice, RandomState | None]] = []
        self._leaf_ND: Tensor | None = None

    @torch.no_grad()
    def fill(self) -> None:
        """First pass, without a graph, over all parts but the last."""
        if not self._early:
            return
        before = RandomState.capture(self._device)
        self._keep(self._early[0])
        if RandomState.capture(self._device).same_as(before):
            for rows in joined(self._early[1:], self._without_graph):
                self._keep(rows)
            self._replays = [(rows, None) for rows in joined(self._early, self._replayed)]
            return
        # The masks belong to the parts: those of the replay must be those of the first pass.
        self._replays = [(self._early[0], before)]
        for rows in self._early[1:]:
            self._replays.append((rows, RandomState.capture(self._device)))
            self._keep(rows)

    def features(self) -> Tensor:
        """The last part goes through the tower; returns all features [N, D], for the loss."""
        last_bD = self._encode(self._last)
        if self._leaf_ND is None:
            return last_bD
        # Without a graph in the last part nothing of the tower is trained, and nothing is to be replayed.
        self._leaf_ND.requires_grad_(last_bD.requires_grad)
        return torch.cat([self._leaf_ND, last_bD])

    def replay(self, precision: Precision, collect: Callable[[], None] = lambda: None) -> None:
        """After the loss's backward pass: the early parts again, each with its gradient. Inside autocast.

        `collect` is called after each.
        """
        gradient_ND = None if self._leaf_ND is None else self._leaf_ND.grad
        if gradient_ND is None:
            return
        for rows, random in self._replays:
            if random is not None:
                random.restore()
            features_bD = self._encode(rows)
            with precision.exact():
                torch.autograd.backward(features_bD, gradient_ND[rows])
            collect()

    def _keep(self, rows: slice) -> None:
        features_bD = self._encode(rows)
        if self._leaf_ND is None:
            self._leaf_ND = features_bD.new_empty(self._early[-1].stop, features_bD.shape[1])
        self._leaf_ND[rows] = features_bD


def accumulate(
    clip: Clip,
    objective: Objective,
    precision: Precision,
    batch: Batch,
    micro_batch_size: int,
    *,
    texts_per_image: int = 1,
    batch_norms: BatchNorms | None = None,
    teacher: StartingModel | None = None,
    larger: Larger | None = None,
    half_weights: HalfWeights | None = None,
) -> Tensor:
    """Adds the gradient of the loss over the whole batch to the parameters' gradients.

    Equal to one pass over the batch, whatever the micro-batch, to the rounding of the format. Random masks
    are drawn a part at a time: they depend on the micro-batch, and are the same in both passes. Afterwards
    the generators stand where the first pass left them. Never waits for the device.

    Args:
        clip: in training mode.
        objective: over all pairs; what it learns itself gets its gradient too.
        precision: its loss scale, if it has one, is in the gradients; not in what is returned.
        batch: on any device; a part of it goes to the towers' device at a time.
        micro_batch_size: pairs whose graphs are held at once; a batch of no more is not divided.
        texts_per_image: texts of a part for each image of a part, for texts that cost less memory.
        batch_norms: of the model; None: looked for.
        teacher: for losses that need one.
        larger: what goes through in larger parts; None: what the model's shape allows.
        half_weights: what stands in for weights where the batch is divided; None: nothing does.

    Returns:
        The loss, a scalar on the device.
    """
    norms = batch_norms or BatchNorms(clip.model)
    taught = None if teacher is None else teacher(batch, micro_batch_size, precision)
    divided = micro_batch_size < len(batch.tokens_BL)
    if larger is None and divided:
        larger = Larger.of(clip, batch.tokens_BL.shape[1])
    caches = _caches(clip, batch, micro_batch_size, texts_per_image, larger or Larger())
    if half_weights is None or not divided:
        return _gradients(clip, objective, precision, batch, caches, norms, taught, _nothing)
    with half_weights.standing_in():
        return _gradients(
            clip, objective, precision, batch, caches, norms, taught, collect=half_weights.collect
        )


def _nothing() -> None:
    """Gradients are where they belong already."""


def _gradients(
    clip: Clip,
    objective: Objective,
    precision: Precision,
    batch: Batch,
    caches: tuple[FeatureCache, FeatureCache],
    norms: BatchNorms,
    taught: Teacher | None,
    collect: Callable[[], None],
) -> Tensor:
    """The three passes; returns the loss."""
    # Two contexts: a weight cast without a graph must not serve where one is needed.
    with precision.autocast():
        for cache in caches:
            cache.fill()
    with precision.autocast():
        image_ND, text_ND = (cache.features() for cache in caches)
        after = RandomState.capture(clip.device)
        with precision.exact():
            value = loss_of_features(clip, objective, batch, image_ND, text_ND, taught)
            del image_ND, text_ND
        with norms.uncounted():  # what checkpointing and the replay compute again has been counted
            with precision.exact():
                scaler = precision.scaler
                (value if scaler is None else value * scaler.scale).backward()  # type: ignore[no-untyped-call]
            collect()
            for cache in caches:
                cache.replay(precision, collect)
    after.restore()
    return value.detach()


def contrastive_loss(clip: Clip, objective: Objective, precision: Precision, batch: Batch) -> Tensor:
    """Forward through both towers and the loss at once; scalar with gradients, on the device."""
    with precision.autocast():
        caches = _caches(clip, batch, len(batch.tokens_BL), 1, Larger())
        image_ND, text_ND = (cache.features() for cache in caches)
    return loss_of_features(clip, objective, batch, image_ND, text_ND)


def loss_of_features(
    clip: Clip,
    objective: Objective,
    batch: Batch,
    image_ND: Tensor,
    text_ND: Tensor,
    teacher: Teacher | None = None,
) -> Tensor:
    """The loss over the features of a whole batch, as the towers leave them; scalar.

    `text_ND` has the wrong captions after the right ones, if the batch has some.
    """
    device, count = clip.device, len(batch.tokens_BL)
    labels_BC, negative_ids_B = batch.labels_BC, batch.negative_ids_B
    identities = Identities(
        image_ids_N=moved(batch.image_ids_B, device),
        caption_ids_N=moved(batch.caption_ids_B, device),
        labels_NC=None if labels_BC is None else moved(labels_BC, device),
    )
    features = Features(
        image_ND=image_ND,
        text_ND=text_ND[:count],
        identities=identities,
        negative_ND=None if negative_ids_B is None else text_ND[count:],
        negative_ids_N=None if negative_ids_B is None else moved(negative_ids_B, device),
        teacher=teacher,
    )
    value: Tensor = objective(clip, features)
    return value


def _caches(
    clip: Clip, batch: Batch, images: int, texts_per_image: int, larger: Larger
) -> tuple[FeatureCache, FeatureCache]:
    device, count = clip.device, len(batch.tokens_BL)

    def image_features(rows: slice) -> Tensor:
        if batch.image_features_BD is not None:
            return moved(batch.image_features_BD[rows], device)
        return clip.encode_images(moved(batch.images_B3HW[rows], device))

    def text_features(rows: slice) -> Tensor:
        if rows.start < count or batch.negative_tokens_BL is None:
            if batch.text_features_BD is not None:
                return moved(batch.text_features_BD[rows], device)
            return clip.encode_texts(moved(batch.tokens_BL[rows], device))
        there = slice(rows.start - count, rows.stop - count)
        return clip.encode_texts(moved(batch.negative_tokens_BL[there], device))

    texts = parts_of(count, images * texts_per_image)
    if batch.negative_tokens_BL is not None:
        # After the captions, in the same lengths: they take no memory beyond another pass of their tower.
        # None of them goes through together with captions, which may have another length.
        texts += [slice(count + part.start, count + part.stop) for part in texts]
        larger = replace(larger, texts=1, replayed_texts=1)
    return (
        FeatureCache(image_features, parts_of(count, images), device, without_graph=larger.images),
        FeatureCache(
            text_features, texts, device, without_graph=larger.texts, replayed=larger.replayed_texts
        ),
    )
