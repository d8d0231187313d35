"""Which batches go through which graph, what is proved, and when there are no more of them.

Where there is no CUDA the graphs are recorded by a recorder that computes again at each replay.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cliptune_model.acceleration.frozen import freeze
from cliptune_model.acceleration.graphs import (
    LIMIT,
    LONGEST_TEXT,
    ROWS,
    Forward,
    Graphs,
    Recorded,
    Shape,
    cuda_recorder,
    shapes,
)
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_model.towers.trimming import TextTrim
from tests.support.models import TEST_MODEL

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip() -> Clip:
    clip = build(ModelSource(name=TEST_MODEL))
    clip.model.requires_grad_(False)
    return clip


class Computing:
    """Records a forward by remembering it; each replay overwrites the same result."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda found: found) -> None:
        self.rows: list[int] = []
        self._change = change

    def __call__(self, forward: Forward, given: Tensor) -> Recorded:
        found_ND = forward(given).clone()

        def replay() -> None:
            self.rows.append(len(given))
            found_ND.copy_(self._change(forward(given)))

        return Recorded(given=given, found_ND=found_ND, replay=replay)


def graphs_of(clip: Clip, record: Computing, *, room_bytes: int = 2**40, held: int = 0) -> Graphs:
    sizes = iter(range(0, 10**9, held)) if held else iter([0] * 1000)
    return Graphs(
        images=clip.encode_images,
        texts=clip.encode_texts,
        record=record,
        device=torch.device("cpu"),
        room_bytes=room_bytes,
        held_bytes=lambda: next(sizes),
    )


def wanted(clip: Clip) -> list[Shape]:
    return shapes(clip.image_size, TextTrim.of(clip.model, clip.context_length).lengths)


def test_one_row_of_each_kind_is_recorded_before_more_and_their_number_is_bounded() -> None:
    found = shapes((224, 224), (16, 24, 32, 40, 48, 64, 77, 96, 128, 160, 192, 224, 248))
    assert len(found) <= LIMIT
    assert found[0] == Shape(rows=1, row=(224, 224))
    assert [shape.rows for shape in found] == sorted(shape.rows for shape in found)
    assert max(shape.row[0] for shape in found if shape.is_text) <= LONGEST_TEXT
    assert {shape.rows for shape in found if not shape.is_text} == set(ROWS)


def test_a_batch_goes_through_the_next_larger_graph_with_the_vectors_of_the_forward(clip: Clip) -> None:
    recorder = Computing()
    graphs = graphs_of(clip, recorder)
    for shape in wanted(clip):
        assert graphs.add(shape)
    assert graphs.choice.value == "on"
    recorder.rows.clear()
    generator = torch.Generator().manual_seed(3)
    for count, rows in ((3, 4), (1, 1), (8, 8), (5, 8), (2, 2)):
        images = torch.randn(count, 3, *clip.image_size, generator=generator)
        with torch.inference_mode():
            found_ND = graphs.run(images)
            assert found_ND is not None
            torch.testing.assert_close(found_ND, clip.encode_images(images), rtol=1e-4, atol=1e-5)
            tokens = clip.tokenize_trimmed(["a red circle"] * count)
            found_ND = graphs.run(tokens)
            assert found_ND is not None
            torch.testing.assert_close(found_ND, clip.encode_texts(tokens), rtol=1e-4, atol=1e-5)
        assert recorder.rows[-2:] == [rows, rows]


def test_batches_that_no_graph_takes_are_left_to_the_forward(clip: Clip) -> None:
    graphs = graphs_of(clip, Computing())
    assert graphs.run(torch.zeros(1, 3, *clip.image_size)) is None
    for shape in wanted(clip):
        graphs.add(shape)
    height, width = clip.image_size
    assert graphs.run(torch.zeros(ROWS[-1] + 1, 3, height, width)) is None
    assert graphs.run(torch.zeros(1, 3, height + 16, width)) is None
    assert graphs.run(torch.ones(1, 13, dtype=torch.int64)) is None


@pytest.mark.parametrize("wrong", [lambda found: found.flip(1), lambda found: found * float("nan")])
def test_a_graph_that_computes_something_else_ends_them_all(
    clip: Clip, wrong: Callable[[Tensor], Tensor]
) -> None:
    recorder = Computing()
    graphs = graphs_of(clip, recorder)
    first, second, *_ = wanted(clip)
    assert graphs.add(first)
    recorder._change = wrong
    assert not graphs.add(second)
    assert graphs.choice.value == "off"
    assert "cosine" in graphs.choice.reason
    assert graphs.run(torch.zeros(1, 3, *clip.image_size)) is None
    assert not graphs.add(first)


def test_a_tower_that_cannot_be_recorded_is_left_out_and_the_other_goes_on(clip: Clip) -> None:
    recorder = Computing()
    graphs = graphs_of(clip, recorder)

    def fails(found: Tensor) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    for shape in wanted(clip):
        recorder._change = fails if shape.is_text else lambda found: found
        assert graphs.add(shape)
    assert graphs.choice.value == "on"
    assert f"{len(ROWS)} graphs" in graphs.choice.reason
    assert "texts: RuntimeError: operation not permitted" in graphs.choice.reason
    recorder._change = lambda found: found
    assert graphs.run(torch.zeros(1, 3, *clip.image_size)) is not None
    assert graphs.run(clip.tokenize_trimmed(["a circle"])) is None
    recorder._change = fails
    neither = graphs_of(clip, recorder)
    assert [neither.add(shape) for shape in wanted(clip)][:2] == [True, False]
    assert neither.choice.value == "off"


def test_graphs_end_where_their_memory_does(clip: Clip) -> None:
    graphs = graphs_of(clip, Computing(), room_bytes=250, held=100)
    added = [graphs.add(shape) for shape in wanted(clip)]
    assert 0 < sum(added) < len(added)
    assert not any(added[added.index(False) :])
    assert "MiB" in graphs.choice.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_graphs_of_frozen_half_precision_towers_give_the_forwards_vectors() -> None:
    clip = build(ModelSource(name=TEST_MODEL), device="cuda")
    clip.model.requires_grad_(False)

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16)

    frozen = freeze(clip, dtype=torch.bfloat16, autocast=autocast)
    assert frozen.choice.value == "bf16", frozen.choice

    def within(forward: Forward) -> Forward:
        def run(batch: Tensor) -> Tensor:
            with autocast():
                return forward(batch)

        return run

    graphs = Graphs(
        images=within(frozen.clip.encode_images),
        texts=within(frozen.clip.encode_texts),
        record=cuda_recorder(),
        device=torch.device("cuda"),
        room_bytes=2**30,
        held_bytes=torch.cuda.memory_reserved,
    )
    for shape in wanted(clip):
        assert graphs.add(shape), graphs.choice
    with torch.inference_mode(), autocast():
        for count in (1, 3, 8):
            images = torch.randn(count, 3, *clip.image_size).pin_memory()
            found_ND = graphs.run(images)
            assert found_ND is not None
            torch.testing.assert_close(found_ND, clip.encode_images(images.cuda()), rtol=2e-2, atol=2e-2)
