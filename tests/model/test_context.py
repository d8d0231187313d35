"""Contexts beyond 77 tokens: Long-CLIP's stretched positions, from the source to the export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from cliptune.errors import ContextLengthError
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of, read_manifest
from cliptune_model.source import ModelSource
from cliptune_model.towers.context import KEPT_POSITIONS, extend_context, longest_context, stretch_positions

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
BASE = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
SHORT = "a photo of a cracked solar cell"
SHARED = "a photo of a cell " * 16  # 80 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a context of 77, as a source."""
    return exported_base(tmp_path_factory.mktemp("base") / "model", BASE)


@pytest.fixture(scope="module")
def short(folder: str) -> Clip:
    return build(ModelSource(name=folder))


@pytest.fixture(scope="module")
def long(folder: str) -> Clip:
    return build(ModelSource(name=folder, context_length=248))


def exported_base(path: Path, config: dict[str, Any], name: str = "cliptune-test-context") -> str:
    """Random weights of this configuration, exported; returns the source's name."""
    with known(name, config):
        clip = build(ModelSource(name=name), seed=5)
    export_model(clip, path, manifest_of(clip))
    return f"local-dir:{path}"


@contextmanager
def known(name: str, config: dict[str, Any]) -> Iterator[None]:
    """A configuration that open_clip knows by name for a while."""
    open_clip.factory._MODEL_CONFIGS[name] = config
    try:
        yield
    finally:
        del open_clip.factory._MODEL_CONFIGS[name]


def embed(clip: Clip, *texts: str) -> Tensor:
    with torch.inference_mode():
        return clip.encode_texts(clip.tokenize(texts))


def of_the_paper(positions: Tensor) -> Tensor:
    """The authors' own loop (Long-CLIP, `load_from_clip`), written down independently of ours."""
    length, keep = len(positions), 20
    rows = [positions[i] for i in range(keep)]
    for i in range(keep, length - 1):
        here, following = positions[i], positions[i + 1]
        rows += [here + (following - here) * quarter / 4 for quarter in range(4)]
    last, before = positions[-1], positions[-2]
    return torch.stack([*rows, *(last + quarter * (last - before) / 4 for quarter in range(4))])


def test_77_positions_become_248_as_the_authors_stretch_them() -> None:
    positions = torch.randn(77, 8)
    stretched = stretch_positions(positions, 248)
    assert stretched.shape == (248, 8)
    torch.testing.assert_close(stretched, of_the_paper(positions), rtol=0, atol=1e-6)
    assert torch.equal(stretched[:KEPT_POSITIONS], positions[:KEPT_POSITIONS])


@pytest.mark.parametrize("length", [78, 100, 154, 247])
def test_any_length_between_keeps_the_first_positions_and_rises_evenly_over_the_rest(length: int) -> None:
    ramp = torch.arange(77.0)[:, None]
    stretched = stretch_positions(ramp, length).flatten()
    assert torch.equal(stretched[:KEPT_POSITIONS], ramp.flatten()[:KEPT_POSITIONS])
    steps = stretched[KEPT_POSITIONS:].diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 57 / (length - 20)), rtol=1e-3, atol=1e-5)


def test_an_unstretched_length_is_the_identity() -> None:
    positions = torch.randn(77, 8)
    assert torch.equal(stretch_positions(positions, 77), positions)


def test_words_beyond_the_77th_token_change_the_embedding(short: Clip, long: Clip) -> None:
    dogs, cats = SHARED + " with dogs", SHARED + " with cats"
    cut = embed(short, dogs, cats)
    assert torch.equal(cut[0], cut[1])
    read = embed(long, dogs, cats)
    assert (read[0] - read[1]).abs().max() > 1e-3
    assert long.tokenize([dogs]).shape == (1, 248)


def test_short_captions_embed_as_before(short: Clip, long: Clip) -> None:
    texts = (SHORT, "cat", "an image of a defective cell at noon in the rain")
    torch.testing.assert_close(embed(long, *texts), embed(short, *texts), rtol=0, atol=1e-5)


def test_trimmed_texts_embed_as_whole_ones(long: Clip) -> None:
    for texts in ([SHORT], [SHARED + " with dogs", SHORT]):
        tokens = long.tokenize(texts)
        trimmed = long.trim(tokens)
        assert trimmed.shape[1] < 248
        with torch.inference_mode():
            torch.testing.assert_close(
                long.encode_texts(trimmed), long.encode_texts(tokens), rtol=0, atol=1e-5
            )


def test_plain_open_clip_loads_the_export_equal(long: Clip, tmp_path: Path) -> None:
    export_model(long, tmp_path / "long", manifest_of(long))
    assert read_manifest(tmp_path / "long").context_length == 248
    name = f"local-dir:{tmp_path / 'long'}"
    plain = open_clip.create_model(name).eval()
    tokens = open_clip.get_tokenizer(name)([SHARED + " with dogs", SHORT])
    assert tokens.shape == (2, 248)
    with torch.inference_mode():
        torch.testing.assert_close(
            plain.encode_text(tokens), embed(long, SHARED + " with dogs", SHORT), rtol=0, atol=1e-6
        )
    again = load_exported(tmp_path / "long")
    assert again.context_length == 248
    assert torch.equal(embed(again, SHORT), embed(long, SHORT))


def test_a_model_that_has_this_context_is_left_as_it_is(short: Clip, folder: str) -> None:
    same = build(ModelSource(name=folder, context_length=77))
    assert same.architecture == short.architecture
    assert torch.equal(embed(same, SHORT), embed(short, SHORT))


def test_every_position_learns(folder: str) -> None:
    clip = build(ModelSource(name=folder, context_length=120))
    clip.encode_texts(clip.tokenize([SHARED * 2])).sum().backward()
    gradient: Any = clip.model.positional_embedding.grad  # type: ignore[union-attr]
    assert gradient.shape == (120, 32)
    assert (gradient.abs().sum(dim=1) > 0).all()


@pytest.fixture
def coca() -> open_clip.coca_model.CoCa:
    torch.manual_seed(0)
    text = {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    decoder = {"width": 32, "heads": 2, "layers": 1, "context_length": 76}
    return open_clip.coca_model.CoCa(32, decoder, text, vision).eval()


def test_coca_keeps_its_class_token_and_its_decoder_reads_as_far(coca: open_clip.coca_model.CoCa) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=76)
    with torch.inference_mode():
        before = coca.encode_text(tokenizer([SHORT]), normalize=False)
    config = {"text_cfg": {"context_length": 76}, "multimodal_cfg": {"context_length": 76}}
    extended = extend_context(coca, config, 200, name="coca")
    assert extended == {"text_cfg": {"context_length": 200}, "multimodal_cfg": {"context_length": 200}}
    tokens = tokenizer([SHORT], context_length=200)
    with torch.inference_mode():
        torch.testing.assert_close(coca.encode_text(tokens, normalize=False), before, rtol=0, atol=1e-5)
        logits = coca(torch.zeros(1, 3, 32, 32), tokens)["logits"]
    assert logits.shape[1] >= 199


@pytest.mark.parametrize(
    ("change", "wanted", "why"),
    [
        ({}, 60, "shorter"),
        ({"context_length": 40}, 101, "up to 100"),
        ({"context_length": 16}, 24, "up to 16"),
        ({"no_causal_mask": True, "pool_type": "last"}, 128, "no causal mask"),
        ({"pool_type": "last"}, 128, "pools 'last'"),
    ],
)
def test_a_tower_that_cannot_be_stretched_so_far_says_why(
    change: dict[str, Any], wanted: int, why: str
) -> None:
    model = open_clip.model.CustomTextCLIP(32, VISION, {**TEXT, **change})
    with pytest.raises(ContextLengthError, match=why) as refused:
        extend_context(model, {"text_cfg": {}}, wanted, name="it")
    assert refused.value.metadata["wanted"] == str(wanted)


def test_a_text_tower_of_another_library_is_refused() -> None:
    model = open_clip.model.CustomTextCLIP(32, VISION, TEXT)
    model.text = torch.nn.Linear(3, 3)
    with pytest.raises(ContextLengthError, match="Linear"):
        extend_context(model, {"text_cfg": {}}, 128, name="it")


@pytest.mark.parametrize("wanted", [0, 249, -1])
def test_no_source_asks_for_what_no_tower_can_take(wanted: int) -> None:
    with pytest.raises(ContextLengthError, match="1 to 248"):
        ModelSource(name="ViT-B-32", context_length=wanted)


def test_the_longest_context_is_four_times_the_rest() -> None:
    assert [longest_context(length) for length in (16, 20, 21, 40, 64, 77, 248)] == [
        16,
        20,
        24,
        100,
        196,
        248,
        248,
    ]
