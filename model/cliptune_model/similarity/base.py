"""What a similarity is: one object for the loss, the evaluation and the server.

Enters: features as the towers leave them. Leaves: scores, and the vectors that a client is given. Subclassed
by the files beside it and by users' own; called by losses, evaluation, zero-shot classes and the engine.

Every similarity is an elementwise function of ONE inner product of prepared vectors,

    similarity(image, text) = of_products(prepare_images(image) . prepare_texts(text)),

so that whatever works on a table of products (losses, tiles of losses, search) works with every similarity.

Shape suffixes: N, M, K rows, D embedding, P prepared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune.errors import SpecError
from cliptune_model.nearest import nearest

_PATH = "model.similarity_parameters"


def widened(tensor: Tensor) -> Tensor:
    """In fp32, if the tensor's own format holds less: too coarse for lengths and products."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def normalise(embeddings_ND: Tensor) -> Tensor:
    """Unit length in fp32 (fp64 for fp64), whatever comes in."""
    return F.normalize(widened(embeddings_ND), dim=-1)


class Bounds(NamedTuple):
    """A parameter that the spec may give: from `low` to `high`, both allowed, and what it is."""

    low: float
    high: float
    meaning: str


class Similarity(nn.Module):
    """How alike an image and a text are. A subclass says what `prepare_*` and `of_products` do.

    What is learned are the module's own parameters: they are trained with the model, kept in its checkpoints
    and exported beside its weights. Everything is computed in fp32 (fp64 for fp64), outside of autocast.

    Args:
        dim: D.
        parameters: values that the spec gives, by name.

    Attributes:
        name: as in a spec and a manifest; a user's own bears what finds it again.
        linear: `of_products` is the identity: a loss may take the table of products in tiles.
        unit: only directions count; features may be cut to unit length wherever they are kept.
        half_products: the product of prepared vectors loses no more in half precision than unit vectors do.
        accepts: the parameters that a spec may give.
        parameters_given: those that it gave.
        sha256: of the file that brought it, for a user's own. Empty: there is none.

    Raises:
        SpecError: a parameter that is unknown, the nearest offered, or out of its bounds.
    """

    name: str = ""
    linear: bool = True
    unit: bool = False
    half_products: bool = False
    sha256: str = ""
    accepts: ClassVar[Mapping[str, Bounds]] = {}

    def __init__(self, dim: int, parameters: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.parameters_given: dict[str, float] = dict(parameters or {})
        for key, value in self.parameters_given.items():
            if key not in self.accepts:
                allowed = ", ".join(self.accepts) or "none"
                raise SpecError(
                    f"{_PATH}.{key} is no parameter of {self.name!r}{nearest(key, self.accepts)};"
                    f" allowed: {allowed}",
                    path=f"{_PATH}.{key}",
                    allowed=allowed,
                )
            low, high, _ = self.accepts[key]
            if not low <= value <= high:  # also false for NaN
                allowed = f"{low:g} to {high:g}"
                raise SpecError(
                    f"{_PATH}.{key} is {value:g}; allowed: {allowed}", path=f"{_PATH}.{key}", allowed=allowed
                )

    def prepare_images(self, image_ND: Tensor) -> Tensor:
        """Features → [N, P], the left side of the product."""
        raise NotImplementedError

    def prepare_texts(self, text_MD: Tensor) -> Tensor:
        """Features → [M, P], the right side of the product."""
        raise NotImplementedError

    def of_products(self, products: Tensor) -> Tensor:
        """Similarities from products, elementwise and of the same shape; differentiable everywhere."""
        return products

    def forward(self, image_ND: Tensor, text_MD: Tensor) -> Tensor:
        """Every image against every text: [N, D], [M, D] → [N, M] fp32."""
        with torch.autocast(image_ND.device.type, enabled=False):
            return self.of_products(self.prepare_images(image_ND) @ self.prepare_texts(text_MD).T)

    def pairs(self, image_ND: Tensor, text_ND: Tensor) -> Tensor:
        """Image i against text i: [N, D], [N, D] → [N] fp32."""
        with torch.autocast(image_ND.device.type, enabled=False):
            products_N = (self.prepare_images(image_ND) * self.prepare_texts(text_ND)).sum(dim=-1)
            return self.of_products(products_N)

    def kept(self, features_ND: Tensor) -> Tensor:
        """What is kept of features where they are stored, fp32: they stand in for them ever after."""
        return normalise(features_ND) if self.unit else widened(features_ND)

    def ensemble(self, features_KD: Tensor) -> Tensor:
        """One class from several prompts: features [K, D] → [D], a text's features again.

        Where only directions count, each is made unit length, and so is their mean (Radford et al. 2021,
        section 3.1.4); elsewhere it is the mean.
        """
        mean_D = self.kept(features_KD).mean(dim=0)
        return normalise(mean_D) if self.unit else mean_D

    def image_vectors(self, image_ND: Tensor) -> Tensor:
        """What a client is given for images: [N, D] fp32, in which the similarity is a simple formula."""
        return self.kept(image_ND)

    def text_vectors(self, text_ND: Tensor) -> Tensor:
        """What a client is given for texts: [N, D] fp32."""
        return self.kept(text_ND)

    def constrain(self) -> None:
        """Brings learned parameters back into their bounds, in place; called after each step."""

    def values(self) -> dict[str, float]:
        """The scalars that it computes with now, given or learned, by name: for reports and clients."""
        return dict(self.parameters_given)
