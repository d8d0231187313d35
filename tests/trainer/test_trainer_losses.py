from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from cliptune_trainer.losses import Identities, infonce, multi_positive


def features(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    image, text = (torch.randn(rows, 16, generator=generator, dtype=dtype) for _ in range(2))
    return F.normalize(image, dim=-1).requires_grad_(), F.normalize(text, dim=-1).requires_grad_()


def identities(images: list[int], captions: list[int]) -> Identities:
    return Identities(image_ids_N=torch.tensor(images), caption_ids_N=torch.tensor(captions))


def test_infonce_and_its_gradients_equal_open_clips_loss() -> None:
    ours, theirs = features(12), features(12)
    scales = [torch.tensor(37.0, requires_grad=True) for _ in range(2)]
    loss = infonce(*ours, scales[0], None, identities(list(range(12)), list(range(12))))
    reference = ClipLoss()(*theirs, scales[1])
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    loss.backward()
    reference.backward()
    for one, other in zip((*ours, scales[0]), (*theirs, scales[1]), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_multi_positive_equals_a_float64_sum_over_each_rows_positives() -> None:
    image_ND, text_ND = features(9, torch.float64)
    images, captions = [0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 3, 3, 3, 4, 5]
    scale = 20.0
    logits = scale * (image_ND @ text_ND.T)
    total = 0.0
    for rows in (logits, logits.T):
        for i in range(9):
            positives = [j for j in range(9) if images[i] == images[j] or captions[i] == captions[j]]
            chances = torch.log_softmax(rows[i], dim=0)
            total -= float(sum(chances[j] for j in positives).detach()) / len(positives)
    loss = multi_positive(
        image_ND.float(), text_ND.float(), torch.tensor(scale), None, identities(images, captions)
    )
    assert float(loss.detach()) == pytest.approx(total / 18, rel=1e-5)
    assert loss.dtype == torch.float32


def test_without_repeats_multi_positive_is_infonce() -> None:
    image_ND, text_ND = features(7)
    alone = identities(list(range(7)), list(range(7)))
    values = [
        float(loss(image_ND, text_ND, torch.tensor(10.0), None, alone).detach())
        for loss in (infonce, multi_positive)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_half_precision_features_are_compared_in_fp32() -> None:
    image_ND, text_ND = features(6)
    alone = identities(list(range(6)), list(range(6)))
    loss = infonce(image_ND.bfloat16(), text_ND.bfloat16(), torch.tensor(100.0), None, alone)
    assert loss.dtype == torch.float32
