"""Every similarity, against its formula in float64 by another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances
from torch import Tensor

from cliptune.errors import SpecError
from cliptune_model.similarity import (
    SIMILARITIES,
    Angular,
    Cosine,
    Dot,
    Lorentz,
    Mahalanobis,
    Similarity,
    SquaredEuclidean,
    similarity_for,
)

DIM = 24


def features(rows: int, seed: int = 0, length: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (length * torch.randn(rows, DIM, generator=generator, dtype=torch.float64)).to(dtype)


def moved(similarity: Similarity) -> Similarity:
    """In float64, what it learns away from its start."""
    similarity.double()
    with torch.no_grad():
        for place, one in enumerate(similarity.parameters()):
            one.add_(0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(place)))
    return similarity


@pytest.mark.parametrize(
    ("similarity", "oracle"),
    [
        (Cosine(DIM), distances.CosineSimilarity()),
        (Dot(DIM, {"scale": 1.0}), distances.DotProductSimilarity(normalize_embeddings=False)),
        (SquaredEuclidean(DIM, {"scale": 1.0}), distances.LpDistance(normalize_embeddings=False, power=2)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_similarities_that_pytorch_metric_learning_has_equal_it(
    similarity: Similarity, oracle: distances.BaseDistance
) -> None:
    image, text = features(7), features(5, seed=1)
    expected = oracle(image, text)
    found = similarity(image, text)
    sign = 1.0 if oracle.is_inverted else -1.0
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, sign * expected, rtol=1e-9, atol=1e-9)


def test_angular_is_the_angles_share_of_a_half_turn() -> None:
    image, text = features(7), features(5, seed=1)
    found = Angular(DIM)(image, text).numpy()
    for row, a in enumerate(image.numpy()):
        for column, b in enumerate(text.numpy()):
            # Kahan's formula for the angle of two vectors, which is exact for small ones too.
            a1, b1 = a / np.linalg.norm(a), b / np.linalg.norm(b)
            angle = 2 * math.atan2(float(np.linalg.norm(a1 - b1)), float(np.linalg.norm(a1 + b1)))
            assert found[row, column] == pytest.approx(1 - angle / math.pi, abs=1e-12)


def test_mahalanobis_is_the_quadratic_form_of_what_it_has_learned() -> None:
    similarity = moved(Mahalanobis(DIM))
    assert isinstance(similarity, Mahalanobis)
    image, text = features(7), features(5, seed=1)
    metric = (similarity.weight @ similarity.weight.T).detach() / DIM
    difference = image[:, None] - text[None]
    expected = -torch.einsum("nmd,de,nme->nm", difference, metric, difference)
    torch.testing.assert_close(similarity(image, text).detach(), expected, rtol=1e-9, atol=1e-9)


def test_mahalanobis_starts_as_the_squared_euclidean_distance() -> None:
    image, text = features(7), features(5, seed=1)
    torch.testing.assert_close(Mahalanobis(DIM).double()(image, text), SquaredEuclidean(DIM)(image, text))


def test_lorentz_is_the_distance_in_the_poincare_ball_of_the_same_curvature() -> None:
    """Ganea et al. 2018, section 2.4: another model of the same space, with formulas of its own."""
    similarity = moved(Lorentz(DIM, {"curvature": 2.5}))
    now = similarity.values()
    root = math.sqrt(now["curvature"])

    def in_ball(tangent: Tensor) -> Tensor:
        length = root * tangent.norm(dim=-1, keepdim=True)
        return torch.tanh(length / 2) * tangent / length

    image, text = features(7), features(5, seed=1)
    a = in_ball(now["image_scale"] * image)[:, None]
    b = in_ball(now["text_scale"] * text)[None]
    square = now["curvature"] * (a - b).square().sum(dim=-1)
    shrunk = (1 - now["curvature"] * a.square().sum(dim=-1)) * (1 - now["curvature"] * b.square().sum(dim=-1))
    expected = -torch.acosh(1 + 2 * square / shrunk) / root
    torch.testing.assert_close(similarity(image, text).detach(), expected, rtol=1e-9, atol=1e-9)


def test_lorentz_brings_what_it_has_learned_back_into_its_bounds() -> None:
    similarity = Lorentz(DIM, {"curvature": 2.0})
    with torch.no_grad():
        similarity.log_curvature.fill_(9.0)
        similarity.log_image_scale.fill_(1.0)
    similarity.constrain()
    assert similarity.values()["curvature"] == pytest.approx(20.0)
    assert similarity.values()["image_scale"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_vectors_for_clients_give_the_similarity_by_the_documented_formula(name: str) -> None:
    similarity = moved(similarity_for(name, DIM))
    image, text = features(7), features(5, seed=1)
    a, b = similarity.image_vectors(image).detach(), similarity.text_vectors(text).detach()
    if name == "lorentz":
        curvature = similarity.values()["curvature"]
        time_a, time_b = ((1 / curvature + one.square().sum(dim=-1)).sqrt() for one in (a, b))
        product = a @ b.T - time_a[:, None] * time_b[None]
        expected = -torch.acosh(-curvature * product) / math.sqrt(curvature)
    elif name in ("squared_euclidean", "mahalanobis"):
        expected = -torch.cdist(a, b).square()
    elif name == "angular":
        expected = 1 - torch.acos(a @ b.T) / math.pi
    else:
        expected = a @ b.T
    torch.testing.assert_close(similarity(image, text).detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_similarities_are_computed_in_fp32_whatever_comes_in(name: str, dtype: torch.dtype) -> None:
    similarity = similarity_for(name, DIM)
    image, text = features(7, dtype=dtype), features(5, seed=1, dtype=dtype)
    exact = similarity_for(name, DIM).double()(image.double(), text.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, pairs = similarity(image, text), similarity.pairs(image[:5], text)
    assert found.dtype == pairs.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pairs, found.diagonal(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_equal_vectors_are_most_alike_and_have_a_finite_gradient(name: str) -> None:
    similarity = similarity_for(name, DIM)
    for length in (1e-4, 1.0, 100.0):
        image = features(6, length=length, dtype=torch.float32).requires_grad_()
        text = image.detach().clone().requires_grad_()
        scores = similarity(image, text)
        if name != "dot" and length == 1.0:
            assert torch.equal(scores.argmax(dim=1), torch.arange(6))
        scores.sum().backward()
        for one in (image, text):
            assert one.grad is not None
            assert torch.isfinite(one.grad).all()


def test_an_angles_slope_goes_on_where_the_arc_cosine_has_none() -> None:
    products = torch.tensor([1.0, 1.0 + 1e-7, -1.0, 1.0 - 1e-5], dtype=torch.float64, requires_grad=True)
    similarity = Angular(DIM)
    values = similarity.of_products(products)
    assert float(values[0].detach()) == pytest.approx(1.0, abs=3e-4)
    assert float(values[2].detach()) == pytest.approx(0.0, abs=3e-4)
    (slopes,) = torch.autograd.grad(values.sum(), products)
    assert torch.isfinite(slopes).all()
    assert (slopes > 0).all()
    rising = similarity.of_products(torch.linspace(-1.000001, 1.000001, 100_001, dtype=torch.float64))
    assert (rising.diff() > 0).all()


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("cosin", "cosine"), ("euclidean", "squared_euclidean"), ("Lorenz", "lorentz")]
)
def test_an_unknown_similarity_is_refused_with_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(SpecError, match=f"did you mean .*'{nearest}'") as caught:
        similarity_for(wrong, DIM)
    assert caught.value.metadata["path"] == "model.similarity"
    assert "mahalanobis" in caught.value.metadata["allowed"]


@pytest.mark.parametrize(
    ("name", "parameters", "told"),
    [
        ("lorentz", {"curvatur": 1.0}, r"did you mean 'curvature'\?"),
        ("lorentz", {"curvature": 0.0}, "0.001 to 1000"),
        ("lorentz", {"image_scale": float("nan")}, "1e-06 to 1"),
        ("cosine", {"scale": 1.0}, "allowed: none"),
    ],
)
def test_a_parameter_that_a_similarity_cannot_take_is_refused(
    name: str, parameters: dict[str, float], told: str
) -> None:
    with pytest.raises(SpecError, match=told) as caught:
        similarity_for(name, DIM, parameters)
    assert caught.value.metadata["path"] == f"model.similarity_parameters.{next(iter(parameters))}"
