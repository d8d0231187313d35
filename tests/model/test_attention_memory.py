"""What attention in blocks saves: bytes of a step, counted on fake tensors with nothing allocated.

Layers of a tower are alike and each adds the same bytes, so steps are counted with one and two layers and
carried on to the whole depth; that this is exact is proved on a small model.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import attention_bytes
from bench.attention_bytes import Case
from cliptune_model.attention import AttentionPlan
from cliptune_model.attention.exact import attention
from cliptune_trainer.memory.count import LiveBytes

MIB = 2**20
SDPA = AttentionPlan(mode="sdpa")
VIT_L_14 = (24, 12)  # layers of the image and the text tower

# The same step is asked for again by the next test.
step_bytes = functools.cache(attention_bytes.step_bytes)


def whole_step_bytes(case: Case, *, pairs: int, layers: tuple[int, int] = VIT_L_14) -> int:
    """As `step_bytes` of a model with `layers` in its image and its text tower."""
    shallow, image, text = (
        step_bytes(replace(case, layers=depth), pairs=pairs) for depth in ((1, 1), (2, 1), (1, 2))
    )
    return shallow + (layers[0] - 1) * (image - shallow) + (layers[1] - 1) * (text - shallow)


def test_vit_l_14_at_336_pixels_takes_at_most_six_tenths_of_math_attention_a_sample() -> None:
    bytes_a_sample = {}
    for mode in ("sliced", "sdpa"):
        plan = AttentionPlan(mode=mode, budget_bytes=64 * MIB)
        case = Case(architecture="ViT-L-14-336", attention=plan)
        few, many = (whole_step_bytes(case, pairs=pairs) for pairs in (4, 8))
        bytes_a_sample[mode] = (many - few) / 4
    assert bytes_a_sample["sliced"] <= 0.6 * bytes_a_sample["sdpa"]


@pytest.mark.parametrize("mode", ["sliced", "sdpa"])
def test_a_deep_model_is_counted_exactly_from_shallow_ones(mode: str) -> None:
    case = Case(architecture="ViT-L-14-336", attention=AttentionPlan(mode=mode, budget_bytes=64 * MIB))
    deeper = step_bytes(replace(case, layers=(6, 3)), pairs=4)
    assert whole_step_bytes(case, pairs=4, layers=(6, 3)) == deeper


def test_an_image_of_1022_pixels_trains_within_8_gib_where_math_attention_does_not() -> None:
    limit = 8 * 2**30
    for plan, fits in ((AttentionPlan(mode="chunked", budget_bytes=512 * MIB), True), (SDPA, False)):
        case = Case(architecture="ViT-L-14", attention=plan, checkpointing=True, image_size=1022)
        assert (whole_step_bytes(case, pairs=1) <= limit) is fits


@pytest.mark.parametrize("mode", ["sliced", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_all_that_is_as_large_as_scores_keeps_to_the_budget(mode: str, dtype: torch.dtype) -> None:
    batch, heads, tokens, width = 8, 4, 640, 32
    budget = 24 * MIB
    with FakeTensorMode():
        q, k, v = (torch.zeros(batch, heads, tokens, width, dtype=dtype).requires_grad_() for _ in range(3))
        mask = torch.zeros(tokens, tokens, dtype=dtype)
        with LiveBytes("cpu") as live:
            out = attention(AttentionPlan(mode=mode, budget_bytes=budget), q, k, v, mask)
            out.sum().backward()
    whole = batch * heads * tokens * tokens * dtype.itemsize
    tokens_bytes = 4 * q.nbytes + 3 * q.nbytes + q.nbytes  # kept; gradients of three; of the output
    assert live.peak < budget + 1.5 * tokens_bytes
    assert budget < whole
