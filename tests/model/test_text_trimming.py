from __future__ import annotations

import copy
from typing import Any, cast

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from cliptune.errors import TensorError
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_model.towers.text_tower import encode_text
from cliptune_model.towers.trimming import TextTrim, choose_trimming

CONTEXT = 40
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": CONTEXT, "width": 32, "heads": 4, "layers": 3}
TEXTS = [
    "a cat",
    "two dogs run across the wet street towards a red house",
    "!",
    "a photo! of something! new!",
]

# What decides whether a text can be cut, as open_clip's own model configurations spell it.
EXACT: dict[str, dict[str, Any]] = {
    "clip": {},
    "eos": {"pool_type": "eos", "eos_id": 49407},
    "custom text": {"custom_text": True},
    "coca": {"coca": True, "embed_cls": True, "output_tokens": True},
    "norms and scales of newer blocks": {"custom_text": True, "qk_norm": True, "ls_init_value": 0.1},
    "a projection with bias": {"custom_text": True, "proj_bias": True},
}
REFUSED: dict[str, dict[str, Any]] = {
    "siglip": {"custom_text": True, "no_causal_mask": True, "pool_type": "last"},
    "mobileclip": {"custom_text": True, "no_causal_mask": True},
    "the last token": {"pool_type": "last"},
    "the first token": {"custom_text": True, "pool_type": "first"},
}


def tower(seed: int = 0, **text: Any) -> nn.Module:
    """A model with weights large enough that every token matters to those after it."""
    text = TEXT | text
    kind = CustomTextCLIP if text.pop("custom_text", False) else CLIP
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if text.pop("coca", False):
            vision = VISION | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
            decoder = {"context_length": CONTEXT, "width": 32, "heads": 4, "layers": 1}
            model: nn.Module = CoCa(32, decoder, text, vision)
        else:
            model = kind(32, VISION, text)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.double()


def tokens() -> Tensor:
    return cast(Tensor, open_clip.SimpleTokenizer(context_length=CONTEXT)(TEXTS))


def trim_of(model: nn.Module) -> TextTrim:
    clip = copy.copy(build(ModelSource(name="cliptune-test-vit")))
    clip.model, clip.context_length = model, CONTEXT
    return TextTrim.of(clip.model, clip.context_length)


def embedded(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings, and the gradients that a loss over them gives every weight of the text tower."""
    model.zero_grad()
    text_BD = encode_text(model, tokens)
    weights_BD = torch.linspace(-1, 1, text_BD.numel(), dtype=text_BD.dtype).view_as(text_BD)
    torch.autograd.backward((text_BD * weights_BD).sum())
    return text_BD.detach(), {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("family", EXACT)
def test_a_causal_tower_gives_trimmed_texts_the_same_embeddings_and_gradients(family: str) -> None:
    model = tower(**EXACT[family])
    trim, whole_BL = trim_of(model), tokens()
    short_BL = trim(whole_BL)
    assert short_BL.shape == (len(TEXTS), 16)
    assert trim.lengths == (16, 24, 32, 40)
    whole, short = embedded(model, whole_BL), embedded(model, short_BL)
    with torch.no_grad():
        reference_BD = cast(Any, model).encode_text(whole_BL, normalize=False)
    assert (reference_BD - whole[0]).abs().max() <= 1e-12
    assert (reference_BD - short[0]).abs().max() <= 1e-12 * float(reference_BD.abs().max())
    assert short[1].keys() == whole[1].keys()
    assert any("positional_embedding" in name for name in short[1])
    for name, gradient in whole[1].items():
        assert (gradient - short[1][name]).norm() <= 1e-11 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize("family", REFUSED)
def test_a_tower_that_reads_its_padding_is_never_trimmed_and_says_why(family: str) -> None:
    model = tower(**REFUSED[family])
    trim, whole_BL = trim_of(model), tokens()
    assert trim.choice.value == "off"
    assert trim(whole_BL) is whole_BL
    assert "padding" in trim.choice.reason or "pools" in trim.choice.reason
    with pytest.raises(TensorError, match="shorter than the context"):
        encode_text(model, whole_BL[:, :16])


@pytest.mark.parametrize("family", ["siglip", "mobileclip"])
def test_what_is_refused_would_indeed_have_changed_the_embeddings(family: str) -> None:
    text = cast(Any, tower(**REFUSED[family])).text
    with torch.no_grad():
        change = (text(tokens()) - text(tokens()[:, :16])).abs().max()
    assert change > 1e-3


def test_a_coca_text_keeps_the_one_padding_token_that_its_class_token_sees() -> None:
    model = tower(**EXACT["coca"])
    trim = trim_of(model)
    for words in (13, 14, 15):  # with start and end: 15, 16 and 17 tokens
        whole_BL = open_clip.SimpleTokenizer(context_length=CONTEXT)([" ".join(["cat"] * words)])
        short_BL = trim(whole_BL)
        assert short_BL.shape[1] == (16 if words == 13 else 24)
        assert (embedded(model, whole_BL)[0] - embedded(model, short_BL)[0]).abs().max() <= 1e-12


def test_texts_are_cut_to_few_lengths_and_a_full_one_not_at_all() -> None:
    clip = build(ModelSource(name="cliptune-test-vit"))
    clip.model, clip.context_length = tower(), CONTEXT
    clip.tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    lengths = {clip.tokenize_trimmed([" ".join(["cat"] * words)]).shape[1] for words in range(1, 60)}
    assert lengths == {16, 24, 32, 40}
    assert choose_trimming(clip.model, clip.context_length).value == "16, 24, 32, 40"
    assert clip.tokenize_trimmed([]).shape == (0, CONTEXT)


def test_a_stretched_context_is_trimmed_like_the_others() -> None:
    clip = build(ModelSource(name="cliptune-tiny-vit", context_length=60))
    assert TextTrim.of(clip.model, clip.context_length).lengths == (16, 24, 32, 40, 48, 60)
    whole_BL = clip.tokenize(["a cat " * 20, "a dog"])
    short_BL = clip.trim(whole_BL)
    assert short_BL.shape == (2, 48)
    with torch.no_grad():
        assert (clip.encode_texts(whole_BL) - clip.encode_texts(short_BL)).abs().max() <= 1e-6


def test_trimming_follows_the_end_of_text_not_the_padding() -> None:
    """Tokens behind the end of the text are never read, whatever they are."""
    model = tower()
    whole_BL = tokens()
    behind_BL = whole_BL.clone()
    behind_BL[:, 20:] = 7
    assert torch.equal(trim_of(model)(behind_BL), trim_of(model)(whole_BL))


def test_zero_shot_classes_are_the_same_from_trimmed_prompts(clip: Clip) -> None:
    prompts = ["a cat", "a photo of a dog"]
    with torch.no_grad():
        whole_BD = clip.encode_texts(clip.tokenize(prompts))
        short_BD = clip.encode_texts(clip.tokenize_trimmed(prompts))
    assert (whole_BD - short_BD).abs().max() <= 1e-6
