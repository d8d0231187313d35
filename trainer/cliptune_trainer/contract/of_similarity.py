"""A user's own similarity, tried out before a job waits for a device.

Enters: a `Similarity` as a spec names it. Leaves: a `Report`. Called by preparation.

Shape suffixes: N images, M texts, D embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cliptune_model.similarity import Similarity, similarity_for
from cliptune_trainer.contract.report import BrokenPromiseError, Report, difference, finite, slope_error

_IMAGES: Final = 6
_TEXTS: Final = 5
_EXACT: Final = 1e-9  # share that may be lost to rounding in fp64
_SLOPE: Final = 1e-4  # as finite differences give it
# What features can be: as a new tower's, all but absent, and far longer than any tower's.
_LENGTHS: Final = (1.0, 1e-3, 1e2)


def try_similarity(similarity: Similarity, path: str = "model.similarity") -> Report:
    """Every promise of `Similarity`: formulas in fp64, finiteness in fp32."""
    report = Report(path=path, reference=similarity.name, role="a similarity")
    trial = _Trial(similarity)
    if not report.check("shapes", trial.shapes):
        return report
    report.check("number by number", trial.elementwise)
    report.check("row by row", trial.rows)
    report.check("`linear` and `unit` as declared", trial.declared)
    report.check("vectors for clients", trial.vectors)
    report.check("finite", trial.finite)
    if report.check("differentiable", trial.differentiable):
        report.check("gradient as finite differences", trial.slopes)
    report.check("the same from its saved state", trial.saved)
    report.check("more alike is more", trial.order)
    return report


@dataclass(frozen=True, slots=True)
class _Trial:
    given: Similarity

    def shapes(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        image_NP, text_MP = similarity.prepare_images(image_ND), similarity.prepare_texts(text_MD)
        shapes = f"{list(image_NP.shape)} for images and {list(text_MP.shape)} for texts"
        if image_NP.ndim != 2 or text_MP.ndim != 2 or image_NP.shape[1] != text_MP.shape[1]:
            raise BrokenPromiseError(f"it prepares {shapes}: not [N, P] and [M, P] of one P")
        if (len(image_NP), len(text_MP)) != (_IMAGES, _TEXTS):
            raise BrokenPromiseError(f"it prepares {shapes} from {_IMAGES} images and {_TEXTS} texts")
        table_NM = similarity(image_ND, text_MD)
        if table_NM.shape != (_IMAGES, _TEXTS):
            raise BrokenPromiseError(f"it scores {list(table_NM.shape)}, not [{_IMAGES}, {_TEXTS}]")
        if {image_NP.dtype, text_MP.dtype, table_NM.dtype} != {torch.float64}:
            raise BrokenPromiseError(f"features of float64 come to {table_NM.dtype}: a format is fixed")
        return f"P = {image_NP.shape[1]}"

    def elementwise(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        products_NM = similarity.prepare_images(image_ND) @ similarity.prepare_texts(text_MD).T
        whole_NM = similarity.of_products(products_NM)
        one_by_one = torch.stack([similarity.of_products(one) for one in products_NM.flatten()])
        if whole_NM.shape != products_NM.shape or difference(whole_NM.flatten(), one_by_one) > _EXACT:
            raise BrokenPromiseError("of_products of a table is not of_products of each of its numbers")
        return ""

    def rows(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        for prepare, features in ((similarity.prepare_images, image_ND), (similarity.prepare_texts, text_MD)):
            alone = torch.cat([prepare(row[None]) for row in features])
            lost = difference(alone, prepare(features))
            if lost > _EXACT:
                raise BrokenPromiseError(
                    f"a row prepared alone differs by {lost:.1e} from the same among others: a batch in parts"
                    " would be another batch"
                )
        pairs_M = similarity.pairs(image_ND[:_TEXTS], text_MD)
        if difference(pairs_M, similarity(image_ND, text_MD).diagonal()) > _EXACT:
            raise BrokenPromiseError("its pairs are not its table's diagonal")
        return ""

    def declared(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        products_NM = similarity.prepare_images(image_ND) @ similarity.prepare_texts(text_MD).T
        if similarity.linear and difference(similarity.of_products(products_NM), products_NM) > _EXACT:
            raise BrokenPromiseError("`linear` is True, but of_products changes products: set it to False")
        if similarity.unit:
            longer_NM = similarity(3.0 * image_ND, 0.5 * text_MD)
            if difference(longer_NM, similarity(image_ND, text_MD)) > _EXACT:
                raise BrokenPromiseError("`unit` is True, but lengths matter: set it to False")
        return ""

    def vectors(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        found = {
            "image_vectors": (similarity.image_vectors(image_ND), tuple(image_ND.shape)),
            "text_vectors": (similarity.text_vectors(text_MD), tuple(text_MD.shape)),
            "ensemble": (similarity.ensemble(text_MD), tuple(text_MD.shape[1:])),
        }
        for name, (vectors, shape) in found.items():
            if tuple(vectors.shape) != shape:
                raise BrokenPromiseError(f"{name} gives {list(vectors.shape)}, not {list(shape)}")
            finite(name, vectors)
        return ""

    def finite(self) -> str:
        similarity = copy.deepcopy(self.given).cpu().float()
        for length in _LENGTHS:
            image_ND, text_MD = self._features(torch.float32)
            cases = {
                "features": text_MD,
                "an image and a text that are equal": image_ND[:_TEXTS].clone(),
                "an image and a text that are opposite": -image_ND[:_TEXTS],
                "features that are 0": torch.zeros_like(text_MD),
            }
            for what, others_MD in cases.items():
                inputs = [(length * one).detach().requires_grad_() for one in (image_ND[:_TEXTS], others_MD)]
                told = f"for {what}, {length:g} times as long as usual"
                table_NM = similarity(*inputs)
                finite(f"a score {told}", table_NM.detach())
                for gradient in torch.autograd.grad(table_NM.sum(), inputs, allow_unused=True):
                    if gradient is not None:
                        finite(f"a gradient {told}", gradient)
        return ""

    def differentiable(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        learned = {name: one for name, one in similarity.named_parameters() if one.requires_grad}
        leaves = {"the images": image_ND.requires_grad_(), "the texts": text_MD.requires_grad_(), **learned}
        total = similarity(image_ND, text_MD).square().sum()
        if not total.requires_grad:
            raise BrokenPromiseError("no gradient leads back from the scores")
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is None or not bool(gradient.any()):
                raise BrokenPromiseError(f"no gradient reaches {name}")
        return f"learns {', '.join(learned)}" if learned else ""

    def slopes(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        leaves = [image_ND.requires_grad_(), text_MD.requires_grad_()]
        leaves += [one for one in similarity.parameters() if one.requires_grad]
        weights_NM = torch.randn(_IMAGES, _TEXTS, generator=_generator(2), dtype=torch.float64)
        value: Callable[[], Tensor] = lambda: (weights_NM * similarity(image_ND, text_MD)).sum()  # noqa: E731
        error = slope_error(value, leaves, _generator(1))
        if error > _SLOPE:
            raise BrokenPromiseError(
                f"slopes differ by {error:.1e}: something is detached, rounded, or computed in fp32"
            )
        return f"to {error:.0e}"

    def saved(self) -> str:
        similarity, image_ND, text_MD = self._exact()
        with torch.no_grad():
            for one in similarity.parameters():
                one.mul_(1.01).add_(0.01)
            similarity.constrain()
        fresh = similarity_for(similarity.name, similarity.dim, similarity.parameters_given).double()
        fresh.load_state_dict(similarity.state_dict())
        lost = difference(fresh(image_ND, text_MD), similarity(image_ND, text_MD))
        if lost > _EXACT:
            raise BrokenPromiseError(
                f"scores differ by {lost:.1e}: what it learns or draws must be a parameter or a buffer of it"
            )
        return ""

    def order(self) -> str:
        similarity, image_ND, _ = self._exact()
        table_NN = similarity(image_ND, image_ND).detach()
        others = table_NN[~torch.eye(_IMAGES, dtype=torch.bool)]
        equal, usual, spread = float(table_NN.diagonal().mean()), float(others.mean()), float(others.std())
        # One that starts from two random maps cannot tell them apart yet; one that is upside down can.
        if equal < usual - spread:
            raise BrokenPromiseError(
                f"equal features score {equal:.3g}, others {usual:.3g}: is it a distance? Take its negative"
            )
        return ""

    def _exact(self) -> tuple[Similarity, Tensor, Tensor]:
        """A copy in fp64, and features."""
        return copy.deepcopy(self.given).cpu().double(), *self._features(torch.float64)

    def _features(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator, dim = _generator(), self.given.dim
        image_ND = torch.randn(_IMAGES, dim, generator=generator, dtype=torch.float64)
        text_MD = torch.randn(_TEXTS, dim, generator=generator, dtype=torch.float64)
        return image_ND.to(dtype), text_MD.to(dtype)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
