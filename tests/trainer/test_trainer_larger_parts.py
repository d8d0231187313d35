from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from cliptune_model.clip import Clip
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.memory.count import LiveBytes
from cliptune_trainer.steps.accumulation import accumulate
from cliptune_trainer.steps.checkpointing import enable_checkpointing
from cliptune_trainer.steps.larger_parts import Larger, passes_of
from cliptune_trainer.steps.precision import Precision
from tests.trainer.towers import distance, gradients, small_batch, small_clip

FP32 = Precision("fp32", "cpu")
ALL: dict[str, Any] = {
    "vision_cfg": {"image_size": 32, "layers": 6, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 6},
}


def deep_clip(patch_dropout: float = 0.0) -> Clip:
    """Towers of six layers; an image is 65 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {**ALL["vision_cfg"], "patch_dropout": patch_dropout}
        model = open_clip.CLIP(32, vision, ALL["text_cfg"])
    return replace(small_clip("vit"), model=model.train(), model_config=ALL)


def few_words(rows: int, *, full: bool = False) -> Batch:
    """Of a vocabulary of 64."""
    batch = small_batch(rows, full=full)
    negatives = batch.negative_tokens_BL
    return replace(
        batch,
        tokens_BL=batch.tokens_BL % 64,
        negative_tokens_BL=None if negatives is None else negatives % 64,
    )


def gradient(clip: Clip, batch: Batch, size: int, larger: Larger | None = None) -> dict[str, Tensor]:
    accumulate(clip, Objective(), FP32, batch, size, larger=larger)
    return gradients(clip)


def rows_that_pass(clip: Clip, batch: Batch, size: int) -> dict[str, list[int]]:
    """Of each pass through a tower."""
    passed: dict[str, list[int]] = {"visual": [], "transformer": []}
    hooks = []
    for name, rows in passed.items():

        def note(_: nn.Module, given: tuple[Tensor, ...], rows: list[int] = rows) -> None:
            rows.append(len(given[0]))

        hooks.append(clip.model.get_submodule(name).register_forward_pre_hook(note))
    gradient(clip, batch, size)
    for hook in hooks:
        hook.remove()
    return passed


def test_the_gradient_is_that_of_the_whole_batch_with_larger_parts_too() -> None:
    clip, batch = deep_clip(), few_words(11)
    wanted = gradient(clip, batch, 11)
    assert distance(gradient(clip, batch, 2), wanted) <= 1e-5
    for larger in (Larger(images=2, texts=3, replayed_texts=2), Larger(replayed_texts=100)):
        assert distance(gradient(clip, batch, 3, larger), wanted) <= 1e-5


def test_what_has_no_graph_and_replayed_texts_go_through_in_larger_parts() -> None:
    passed = rows_that_pass(deep_clip(), few_words(16), 2)
    assert passed["visual"] == [2, 6, 6, 2, *[2] * 7]
    assert passed["transformer"] == [2, 6, 6, 2, 7, 7]


def test_the_passes_that_are_compiled_first_are_those_of_a_step() -> None:
    clip, batch = deep_clip(), few_words(16)
    for size, taken in ((2, rows_that_pass(clip, batch, 2)), (16, rows_that_pass(clip, batch, 16))):
        told = passes_of(clip, 16, size, 16)
        for tokens, tower in ((0, "visual"), (16, "transformer")):
            assert {one.rows for one in told if one.tokens == tokens} == set(taken[tower])
    assert {(one.tokens, one.rows) for one in passes_of(clip, 16, 2, 16) if one.with_graph} == {
        (0, 2),
        (16, 2),
        (16, 7),
    }


def test_wrong_captions_go_through_apart_from_the_right_ones() -> None:
    clip, batch = deep_clip(), few_words(8, full=True)
    assert rows_that_pass(clip, batch, 2)["transformer"] == [2] * 15


def test_random_masks_keep_the_parts_as_they_are() -> None:
    passed = rows_that_pass(deep_clip(patch_dropout=0.5), few_words(8), 2)
    assert passed["visual"] == [2] * 7
    assert passed["transformer"] == [2, 4, 2, 6]


def test_larger_parts_take_no_more_memory_than_the_micro_batch() -> None:
    clip, batch = deep_clip(), few_words(48)

    def peak_bytes(larger: Larger | None) -> int:
        with LiveBytes("cpu") as live:
            for weight in clip.model.parameters():
                live.adopt(weight)
            gradient(clip, batch, 6, larger)
        peak: int = live.peak
        return peak

    assert peak_bytes(None) <= peak_bytes(Larger())


def test_the_largest_parts_follow_from_the_towers_shapes() -> None:
    clip = deep_clip()
    assert Larger.of(clip, 16) == Larger(images=4, texts=4, replayed_texts=1 + 65 // 16)
    clip = replace(clip, model_config={**ALL, "text_cfg": {"hf_model_name": "one of another shape"}})
    assert Larger.of(clip, 16) == Larger(images=4, texts=4)


@pytest.mark.parametrize("why", ["recomputing", "frozen", "shallow", "batch normalisation"])
def test_parts_stay_as_they_are_where_graphs_keep_little_or_rows_are_mixed(why: str) -> None:
    clip = deep_clip() if why in ("recomputing", "frozen") else small_clip("vit")
    if why == "recomputing":
        enable_checkpointing(clip)
    elif why == "frozen":
        clip.model.get_submodule("visual").requires_grad_(False)
        clip.model.get_submodule("transformer").requires_grad_(False)
    elif why == "batch normalisation":
        clip = small_clip("resnet")
    assert Larger.of(clip, 16) == Larger()
