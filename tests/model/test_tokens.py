"""Which texts are taken, and that a hostile one costs no more than others."""

from __future__ import annotations

import random
import string
import time

import open_clip
import pytest
import torch

from cliptune.errors import TextError
from cliptune_model import tokens as tokens_module
from cliptune_model.clip import Clip
from cliptune_model.tokens import MAX_TEXT_CHARS, MAX_WORD_CHARS, check_text, without_waste


@pytest.mark.parametrize("text", ["a", "a cat", "猫", "word " * 3_999, "x" * MAX_WORD_CHARS, "🙂"])
def test_ordinary_texts_are_taken(text: str) -> None:
    check_text(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty"),
        (" \t\n\u00a0", "white space"),
        ("a " * 50_000, "100,000 characters"),
        ("x" * (MAX_WORD_CHARS + 1), "one word"),
        ("broken \ud800 pair", "Unicode"),
        (7, "not int"),
        (None, "not NoneType"),
    ],
)
def test_other_texts_are_a_text_error(text: str, complaint: str) -> None:
    with pytest.raises(TextError, match=complaint):
        check_text(text)


def test_the_limit_is_in_the_error() -> None:
    with pytest.raises(TextError) as caught:
        check_text("a " * 50_000)
    assert caught.value.metadata == {"length": "100000", "limit": str(MAX_TEXT_CHARS)}


def test_the_costliest_text_that_is_taken_tokenises_within_a_second(clip: Clip) -> None:
    letters = random.Random(1)
    words = ["".join(letters.choices(string.ascii_lowercase, k=MAX_WORD_CHARS)) for _ in range(19)]
    start = time.process_time()
    clip.tokenize([" ".join(words)])
    assert time.process_time() - start < 1.0


def test_the_tokeniser_forgets_words_and_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAX_CACHED_WORDS", 50)
    plain = open_clip.SimpleTokenizer(context_length=20)
    frugal = without_waste(plain)
    for number in range(200):
        text = f"word{chr(97 + number % 26)}{chr(97 + number // 26)} is here"
        assert torch.equal(frugal([text]), plain([text]))
    assert len(frugal.cache) < 60  # type: ignore[attr-defined]
    assert len(plain.cache) > 200


def test_every_kind_of_text_gives_open_clips_tokens() -> None:
    plain = open_clip.SimpleTokenizer(context_length=30)
    frugal = without_waste(plain)
    draw = random.Random(3)
    texts = [
        "A Cat, on the (green) mat: it's 12.5% ~ 'so-so'... isn't it?",
        "  two  spaces\tand a tab\nand a line ",
        "fish &amp; chips &lt;3 & more",
        "caf\u00e9 \u201cquoted\u201d schÃ¶n \ufb01ne 猫 🙂",
        "control \x1b[31mred\x1b[0m \x7f bell \x07",
        "<end_of_text> in the middle <start_of_text>",
        *("".join(draw.choices(string.printable, k=draw.randrange(1, 80))) for _ in range(300)),
        *("".join(draw.choices(string.ascii_letters + " .,'-!", k=150)) for _ in range(50)),
    ]
    assert torch.equal(frugal(texts), plain(texts))
    assert torch.equal(frugal(texts), plain(texts)), "from memory"
    for length in (2, 5, 77):
        assert torch.equal(frugal(texts, length), plain(texts, length))  # type: ignore[call-arg]


def test_other_tokenisers_are_left_as_they_are() -> None:
    random_masks = open_clip.SimpleTokenizer(context_length=20, reduction_mask="random")
    assert without_waste(random_masks) is random_masks
