"""A user's own loss, tried out before a job waits for a device.

Enters: the loss, its parameters, the similarity that prepares its features. Leaves: a `Report`. Called by
preparation.

Shape suffixes: N pairs, D embedding, C labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from cliptune_model.similarity import Similarity
from cliptune_trainer.contract.report import BrokenPromiseError, Report, difference, finite, slope_error
from cliptune_trainer.losses.contrast import Contrast, Loss, Teacher
from cliptune_trainer.losses.entry import BIAS, LABELS, NEGATIVE_CAPTIONS, TEACHER
from cliptune_trainer.losses.identities import Identities
from cliptune_trainer.losses.own import declaration_of
from cliptune_trainer.steps.accumulation import FeatureCache
from cliptune_trainer.steps.parts import parts_of
from cliptune_trainer.steps.precision import Precision

_PAIRS: Final = 8
_PART: Final = 3
_LABELS: Final = 3
_SCALE: Final = 10.0
# As long as a trained model's logits get.
_LARGEST_SCALE: Final = 100.0
_EXACT: Final = 1e-9  # share that may be lost to rounding in fp64
_SLOPE: Final = 1e-4  # as finite differences give it


def try_loss(
    function: Callable[..., Tensor],
    similarity: Similarity,
    *,
    parameters: Mapping[str, float] | None = None,
    needs: frozenset[str] | None = None,
    path: str = "loss.name",
    reference: str = "",
) -> Report:
    """Every promise of a loss.

    Args:
        function: the loss, with what it `declares`.
        similarity: of the model that it is to train.
        parameters: of the loss; others take their defaults.
        needs: what batches hold because of it and of others beside it; None: what it declares.
        path: of the spec's field that names it.
        reference: what the spec calls it.
    """
    declared = declaration_of(function)
    report = Report(path=path, reference=reference or getattr(function, "__name__", "it"), role="a loss")
    loss = partial(function, **(parameters or {}))
    trial = _Trial(loss, declared.needs if needs is None else needs, similarity)
    if not report.check("one number", trial.scalar):
        return report
    report.check("finite", trial.finite)
    # Of one that is not pure nothing else can be said: it would differ from itself.
    if report.check("pure", trial.pure) and report.check("differentiable", trial.differentiable):
        report.check("exact in parts", trial.accumulated)
        if not declared.stops_gradient:
            report.check("gradient as finite differences", trial.slopes)
    return report


@dataclass(frozen=True, slots=True)
class _Trial:
    loss: Loss
    needs: frozenset[str]
    similarity: Similarity

    def scalar(self) -> str:
        for dtype in (torch.float32, torch.float64):
            value = self.loss(self._contrast(*self._features(dtype)))
            if not isinstance(value, Tensor):
                raise BrokenPromiseError(f"it returns a {type(value).__name__}, not a tensor")
            if value.ndim:
                raise BrokenPromiseError(f"it returns a tensor of shape {list(value.shape)}, not a scalar")
            if value.dtype != dtype:
                raise BrokenPromiseError(f"features of {dtype} come to {value.dtype}: a format is fixed")
        return ""

    def finite(self) -> str:
        image_ND, text_ND = self._features(torch.float32)
        same_ND = image_ND[:1].expand_as(image_ND)
        cases = {
            "for random features": (image_ND, text_ND, _SCALE, False),
            f"at a logit scale of {_LARGEST_SCALE:g}": (image_ND, text_ND, _LARGEST_SCALE, False),
            "where all images and texts are equal": (same_ND, same_ND, _LARGEST_SCALE, False),
            "where all rows have one caption": (image_ND, text_ND, _SCALE, True),
            "for two pairs of one image": (image_ND[:2], text_ND[:2], _SCALE, False),
        }
        for told, (images, texts, scale, one_caption) in cases.items():
            leaves = [images.detach().clone().requires_grad_(), texts.detach().clone().requires_grad_()]
            value = self.loss(self._contrast(*leaves, scale=scale, one_caption=one_caption))
            finite(f"the loss {told}", value.detach())
            if value.requires_grad:
                for gradient in torch.autograd.grad(value, leaves, allow_unused=True):
                    if gradient is not None:
                        finite(f"its gradient {told}", gradient)
        return ""

    def pure(self) -> str:
        contrast = self._contrast(*self._features(torch.float64))
        before = [tensor.clone() for tensor in _tensors(contrast)]
        values = [self.loss(contrast).detach()]
        if not all(map(torch.equal, before, _tensors(contrast))):
            raise BrokenPromiseError("it changes the contrast that it is given")
        values += [self.loss(contrast).detach() for _ in range(2)]
        if not (torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])):
            told = ", ".join(f"{float(value):.6g}" for value in values)
            raise BrokenPromiseError(f"the same batch comes to {told}: it draws numbers or remembers batches")
        return ""

    def differentiable(self) -> str:
        leaves = [one.requires_grad_() for one in self._features(torch.float64)]
        value = self.loss(self._contrast(*leaves))
        if not value.requires_grad:
            raise BrokenPromiseError("no gradient leads back from it")
        for name, gradient in zip(
            ("images", "texts"), torch.autograd.grad(value, leaves, allow_unused=True), strict=True
        ):
            if gradient is None or not bool(gradient.any()):
                raise BrokenPromiseError(f"no gradient reaches the {name}")
        return ""

    def accumulated(self) -> str:
        """The gradient of two small towers, as the trainer takes it from a batch in parts."""
        whole, parts = (self._tower_gradients(size) for size in (_PAIRS, _PART))
        lost = max(map(difference, parts, whole))
        if lost > _EXACT:
            raise BrokenPromiseError(
                f"a batch of {_PAIRS} in parts of {_PART} has a gradient that differs by {lost:.1e}"
            )
        return f"to {lost:.0e}"

    def slopes(self) -> str:
        leaves = [one.requires_grad_() for one in self._features(torch.float64)]
        log_scale = torch.tensor(math.log(_SCALE), dtype=torch.float64, requires_grad=True)
        value: Callable[[], Tensor] = lambda: self.loss(  # noqa: E731
            replace(self._contrast(*leaves), logit_scale=log_scale.exp())
        )
        error = slope_error(value, [*leaves, log_scale], _generator(2))
        if error > _SLOPE:
            raise BrokenPromiseError(
                f"slopes differ by {error:.1e}: something is detached, rounded, or computed in fp32; if that"
                " is meant, declare stops_gradient=True"
            )
        return f"to {error:.0e}"

    def _tower_gradients(self, part: int) -> list[Tensor]:
        inputs = self._features(torch.float64)
        towers = [nn.Linear(self.similarity.dim, self.similarity.dim, dtype=torch.float64) for _ in inputs]
        device, precision = torch.device("cpu"), Precision("fp32", torch.device("cpu"))
        with torch.no_grad():
            for number, tower in enumerate(towers):
                for one in tower.parameters():
                    noise = torch.randn(one.shape, generator=_generator(number), dtype=one.dtype)
                    one.copy_(noise / math.sqrt(self.similarity.dim))
        caches = [
            FeatureCache(partial(_rows_through, tower, features), parts_of(_PAIRS, part), device)
            for tower, features in zip(towers, inputs, strict=True)
        ]
        for cache in caches:
            cache.fill()
        image_ND, text_ND = (cache.features() for cache in caches)
        torch.autograd.backward(self.loss(self._contrast(image_ND, text_ND)))
        for cache in caches:
            cache.replay(precision)
        return [one.grad for tower in towers for one in tower.parameters() if one.grad is not None]

    def _features(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Texts near their images, as of a model that knows something."""
        generator, shape = _generator(seed), (_PAIRS, self.similarity.dim)
        image_ND = torch.randn(shape, generator=generator, dtype=torch.float64)
        text_ND = 0.5 * image_ND + torch.randn(shape, generator=generator, dtype=torch.float64)
        return image_ND.to(dtype), text_ND.to(dtype)

    def _contrast(
        self, image_ND: Tensor, text_ND: Tensor, *, scale: float = _SCALE, one_caption: bool = False
    ) -> Contrast:
        """As the objective makes it: a batch in which an image, a caption and labels stand twice."""
        dtype, count = image_ND.dtype, len(image_ND)
        similarity = copy.deepcopy(self.similarity).cpu().to(dtype)
        places = torch.arange(count)
        ids = torch.zeros_like(places) if one_caption else places.clone()
        ids[-1] = 0
        images = places.clone()
        images[count // 2] = images[count // 2 - 1]
        labels_NC = torch.eye(_LABELS)[places % _LABELS]

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=dtype)

        # Further captions and a teacher, which stand still whatever the features do.
        other_ND, negative_ND = (one[:count] for one in self._features(dtype, seed=1))
        return Contrast(
            image_NP=similarity.prepare_images(image_ND),
            text_NP=similarity.prepare_texts(text_ND),
            logit_scale=number(scale),
            logit_bias=number(-scale) if BIAS in self.needs else None,
            identities=Identities(
                image_ids_N=images, caption_ids_N=ids, labels_NC=labels_NC if LABELS in self.needs else None
            ),
            of_products=similarity.of_products,
            in_modal=lambda: (similarity.prepare_texts(image_ND), similarity.prepare_images(text_ND)),
            negative_text_MP=similarity.prepare_texts(negative_ND)
            if NEGATIVE_CAPTIONS in self.needs
            else None,
            negative_ids_M=torch.full((count,), -1) if NEGATIVE_CAPTIONS in self.needs else None,
            teacher=Teacher(
                image_ND=similarity.prepare_images(other_ND),
                text_ND=similarity.prepare_texts(negative_ND),
                logit_scale=number(scale),
                of_products=similarity.of_products,
            )
            if TEACHER in self.needs
            else None,
        )


def _rows_through(tower: nn.Module, features_ND: Tensor, rows: slice) -> Tensor:
    features: Tensor = tower(features_ND[rows])
    return features


def _tensors(contrast: Contrast) -> list[Tensor]:
    ids = contrast.identities
    found = [contrast.image_NP, contrast.text_NP, contrast.logit_scale, ids.image_ids_N, ids.caption_ids_N]
    optional = (contrast.logit_bias, contrast.negative_text_MP, contrast.negative_ids_M, ids.labels_NC)
    return [tensor.detach() for tensor in (*found, *(one for one in optional if one is not None))]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
