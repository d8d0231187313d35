"""Similarity and zero-shot classes, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from cliptune.errors import InvalidInputError, TextError
from cliptune_model.clip import Clip
from cliptune_model.similarity import Cosine
from cliptune_model.zero_shot import class_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_normalises_in_fp32_whatever_comes_in(dtype: torch.dtype) -> None:
    a, b = (
        50 * torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)).to(dtype) for rows in (5, 7)
    )
    expected = torch.nn.functional.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)
    scores = Cosine(24)(a, b)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), expected, rtol=0, atol=1e-6)
    assert torch.allclose(Cosine(24).pairs(a, b[:5]), scores.diagonal(), rtol=0, atol=1e-6)


def test_class_embeddings_normalise_average_and_normalise_again(clip: Clip) -> None:
    classes = [("cat", ["a cat", "a photo of a cat", "the cat"]), ("dog", ["a dog"])]
    with torch.no_grad():
        expected = []
        for _, prompts in classes:
            each = clip.encode_texts(clip.tokenize(prompts)).double()
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(dim=0)
            expected.append(mean / mean.norm())
    for batch_size in (1, 3, 64):
        embeddings = class_embeddings(clip, classes, batch_size=batch_size)
        assert embeddings.shape == (2, clip.embedding_dim)
        assert not embeddings.requires_grad
        assert torch.allclose(embeddings.double(), torch.stack(expected), rtol=0, atol=1e-6)


def test_classes_that_make_no_sense_are_refused(clip: Clip) -> None:
    with pytest.raises(InvalidInputError, match="at least one class"):
        class_embeddings(clip, [])
    with pytest.raises(InvalidInputError, match="'dog' has no prompts"):
        class_embeddings(clip, [("cat", ["a cat"]), ("dog", [])])
    with pytest.raises(TextError):
        class_embeddings(clip, [("cat", [" "])])
