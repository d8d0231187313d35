from __future__ import annotations

import importlib
import logging

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from cliptune.errors import SpecError
from cliptune_trainer.losses import (
    LOSSES,
    Contrast,
    Identities,
    Loss,
    choose_tiling,
    loss_bytes,
    loss_for,
)
from cliptune_trainer.losses.fused import Fused
from cliptune_trainer.losses.tiles import spans
from cliptune_trainer.memory.count import LiveBytes

TILED = [name for name, entry in LOSSES.items() if entry.tiled]
ROWS, BLOCK = 300, 128  # nine tiles, the last ones smaller
SCALE, BIAS = 20.0, -6.0

tiled_softmax = importlib.import_module("cliptune_trainer.losses.tiled_softmax")
tiled_sigmoid = importlib.import_module("cliptune_trainer.losses.tiled_sigmoid")


def inputs(rows: int, dtype: torch.dtype, scale: float = SCALE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of pairs that belong together a little, scale and bias; all of them trained."""
    generator = torch.Generator().manual_seed(rows)
    image, noise = (torch.randn(rows, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    image_ND, text_ND = F.normalize(image, dim=-1), F.normalize(image + 2 * noise, dim=-1)
    leaves = image_ND, text_ND, torch.tensor(scale), torch.tensor(BIAS)
    return tuple(leaf.to(dtype).requires_grad_() for leaf in leaves)  # type: ignore[return-value]


def some_shared(rows: int) -> Identities:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, limit, (rows,), generator=generator) for limit in (rows, rows // 4)]
    return Identities(image_ids_N=ids[0], caption_ids_N=ids[1])


def contrast(leaves: tuple[Tensor, ...], identities: Identities, *, bias: bool = True) -> Contrast:
    image_ND, text_ND, scale, added = leaves
    return Contrast(
        image_NP=image_ND,
        text_NP=text_ND,
        logit_scale=scale,
        logit_bias=added if bias else None,
        identities=identities,
    )


def value_and_gradients(loss: Loss, leaves: tuple[Tensor, ...], identities: Identities) -> list[Tensor]:
    value = loss(contrast(leaves, identities))
    value.backward()  # type: ignore[no-untyped-call]
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def distances(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        float((one.double() - other.double()).norm() / other.double().norm())
        for one, other in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("name", TILED)
def test_tiles_give_the_loss_and_every_gradient_of_the_whole_table(name: str) -> None:
    identities = some_shared(ROWS)
    exact = value_and_gradients(loss_for(name, tiled=False), inputs(ROWS, torch.float64), identities)
    assert len(exact) == (5 if name == "sigmoid" else 4)
    tiles = loss_for(name, tiled=True, block=BLOCK)
    assert max(distances(value_and_gradients(tiles, inputs(ROWS, torch.float64), identities), exact)) < 1e-13
    assert max(distances(value_and_gradients(tiles, inputs(ROWS, torch.float32), identities), exact)) < 1e-6


@pytest.mark.parametrize("name", TILED)
def test_a_batch_smaller_than_a_tile_and_one_of_a_single_odd_row_more_are_no_exceptions(name: str) -> None:
    for rows in (5, BLOCK + 1):
        identities = some_shared(rows)
        exact = value_and_gradients(loss_for(name, tiled=False), inputs(rows, torch.float64), identities)
        tiles = loss_for(name, tiled=True, block=BLOCK)
        found = value_and_gradients(tiles, inputs(rows, torch.float64), identities)
        assert max(distances(found, exact)) < 1e-12


def test_the_whole_range_of_logits_neither_overflows_nor_vanishes() -> None:
    # Images point away from all texts: every logit of a row is near -100, where exp alone is 0.
    text_ND = F.normalize(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 0.1 + 1, dim=-1)
    scale, identities = torch.tensor(100.0), some_shared(40)
    for name in ("infonce", "multi_positive"):
        for image_ND in (-text_ND, text_ND):
            given = contrast((image_ND, text_ND, scale, scale), identities, bias=False)
            whole = loss_for(name, tiled=False)(given)
            tiles = loss_for(name, tiled=True, block=16)(given)
            assert torch.isfinite(tiles)
            torch.testing.assert_close(tiles, whole, rtol=1e-5, atol=1e-6)


def test_a_number_that_is_none_stays_visible_in_the_loss() -> None:
    for name in TILED:
        leaves = tuple(leaf.detach() for leaf in inputs(40, torch.float32))
        leaves[0][3, 2] = torch.nan
        loss = loss_for(name, tiled=True, block=16)(contrast(leaves, some_shared(40)))
        assert not torch.isfinite(loss), name


def test_gradients_flow_only_to_what_is_trained_and_are_scaled_by_what_comes_after() -> None:
    image_ND, text_ND, scale, bias = inputs(40, torch.float32)
    text_ND = text_ND.detach()
    tiles = loss_for("sigmoid", tiled=True, block=16)
    (1024 * tiles(contrast((image_ND, text_ND, scale, bias.detach()), some_shared(40)))).backward()
    whole = inputs(40, torch.float32)
    loss = loss_for("sigmoid", tiled=False)
    loss(contrast((whole[0], text_ND, whole[2], whole[3].detach()), some_shared(40))).backward()
    assert text_ND.grad is None
    for one, other in ((image_ND, whole[0]), (scale, whole[2])):
        assert one.grad is not None
        assert other.grad is not None
        assert distances([one.grad / 1024], [other.grad])[0] < 1e-5
    with torch.no_grad():
        assert not tiles(contrast((image_ND, text_ND, scale, bias), some_shared(40))).requires_grad


def test_half_precision_features_are_multiplied_in_fp32_where_logits_would_be_rounded() -> None:
    leaves = tuple(leaf.detach().bfloat16() for leaf in inputs(60, torch.float32))
    whole = loss_for("infonce", tiled=False)(contrast(leaves, some_shared(60)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiles = loss_for("infonce", tiled=True, block=32)(contrast(leaves, some_shared(60)))
    assert tiles.dtype == torch.float32
    torch.testing.assert_close(tiles, whole, rtol=1e-6, atol=0)
    trained = tuple(leaf.requires_grad_() for leaf in leaves)
    gradients = value_and_gradients(loss_for("sigmoid", tiled=True, block=32), trained, some_shared(60))[1:]
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


def test_the_sigmoid_loss_is_that_of_siglip() -> None:
    ours, theirs = inputs(12, torch.float32), inputs(12, torch.float32)
    value = loss_for("sigmoid", tiled=False)(contrast(ours, some_shared(12)))
    reference = SigLipLoss()(*theirs)
    assert float(value.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    value.backward()
    reference.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_sigmoid_loss_refuses_a_model_without_bias() -> None:
    for loss in (loss_for("sigmoid", tiled=False), loss_for("sigmoid", tiled=True, block=8)):
        with pytest.raises(ValueError, match="logit bias"):
            loss(contrast(inputs(12, torch.float32), some_shared(12), bias=False))


@pytest.mark.parametrize("name", TILED)
def test_tiles_take_the_memory_of_tiles_and_the_estimates_hold_what_is_taken(name: str) -> None:
    rows, identities = 1536, some_shared(1536)
    taken = {}
    for wanted, budget_bytes in (("off", None), ("on", 2 << 20)):
        choice = choose_tiling(name, wanted, rows, 24, "cpu", budget_bytes)
        tiled = choice.value != "off"
        loss = loss_for(name, tiled=tiled, block=int(choice.value) if tiled else None)
        leaves = inputs(rows, torch.float32)
        with LiveBytes("cpu") as live:
            value_and_gradients(loss, leaves, identities)
        taken[wanted] = live.peak
        assert live.peak <= loss_bytes(name, rows, 24, choice)
        assert live.peak > 0.75 * loss_bytes(name, rows, 24, choice)
    assert taken["on"] < taken["off"] / 8


def test_small_batches_are_taken_whole_and_large_ones_in_tiles_that_fit() -> None:
    def value(wanted: str, n: int, device: str, budget_bytes: int | None = None) -> str:
        return choose_tiling("infonce", wanted, n, 512, device, budget_bytes).value

    assert value("auto", 1024, "cpu") == "off"
    assert value("auto", 65_536, "cuda:0") == "8192"
    assert value("auto", 65_536, "cuda:0", 1 << 28) == "4096"
    assert value("auto", 4096, "mps", 64 << 20) == "2048"
    assert value("on", 1024, "cpu") == "2048"
    assert value("off", 65_536, "cuda:0") == "off"
    # Apple's first chips sum wrongly over so many pairs: no table is taken whole.
    assert int(value("auto", 32_768, "mps")) < 32_767
    with pytest.raises(SpecError, match=r"loss\.tiling"):
        value("off", 32_768, "mps")


def test_spans_cover_everything_once_and_none_is_longer_than_the_block() -> None:
    for count in (1, 63, 64, 65, 100, 300, 1000, 8192, 8193):
        for block in (16, 64, 256, 8192):
            found = spans(count, block)
            assert [at for span in found for at in range(span.start, span.stop)] == list(range(count))
            assert max(span.stop - span.start for span in found) <= block
            assert len({span.stop - span.start for span in found}) <= 2


@pytest.mark.parametrize("on_diagonal", [True, False])
def test_what_is_compiled_computes_the_same_and_leaves_its_inputs(
    on_diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs that CUDA gets, without the compiler behind them.
    monkeypatch.setattr(torch, "compile", lambda function: torch._dynamo.optimize("aot_eager")(function))
    logits_MK = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).square_()[:16]
    row_M, column_K, shares_K = logits_MK.logsumexp(1), logits_MK.logsumexp(0), torch.rand(16)
    same_MK, half = logits_MK > 2, torch.bfloat16
    for function, arguments in (
        (tiled_softmax._sums_of, (logits_MK,)),
        (tiled_softmax._positives_of, (logits_MK, same_MK)),
        (tiled_softmax._gradient_of, (logits_MK, row_M, column_K, on_diagonal, half)),
        (tiled_softmax._shared_gradient_of, (logits_MK, row_M, column_K, same_MK, shares_K, shares_K, half)),
        (tiled_sigmoid._value_of, (logits_MK, shares_K[0], on_diagonal)),
        (tiled_sigmoid._value_and_gradient_of, (logits_MK, shares_K[0], on_diagonal, half)),
    ):
        before = logits_MK.clone()
        fused = Fused(function)
        torch.testing.assert_close(fused.compiled(*arguments), function(*arguments))
        assert fused.failure is None
        torch.testing.assert_close(logits_MK, before, rtol=0, atol=0)


def test_a_compiler_that_fails_is_named_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def broken(function: object) -> object:
        def compiled(number: Tensor) -> Tensor:
            tried.append(1)
            raise RuntimeError("no C compiler was found")

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    double = Fused(lambda number: 2 * number)
    with caplog.at_level(logging.WARNING):
        assert double.compiled(torch.tensor(3.0)) == 6
        assert double.compiled(torch.tensor(4.0)) == 8
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the loss's tiles are computed uncompiled, slower: RuntimeError: no C compiler was found"
    ]


def test_memory_that_runs_out_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function: full)
    double = Fused(lambda number: 2 * number)
    with pytest.raises(torch.OutOfMemoryError):
        double.compiled(torch.tensor(3.0))
    assert double.failure is None
