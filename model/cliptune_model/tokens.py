"""Which texts are accepted, and tokenising without wasted work.

Enters: texts of users. Leaves: nothing or a `TextError`; open_clip's tokeniser in a form that a hostile text
cannot keep busy. Called by `cliptune_model.clip`, by the engine for each text alone, and by the trainer for
captions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from torch import Tensor

from cliptune.errors import TextError

MAX_TEXT_CHARS: Final = 20_000
# Byte-pair merging takes time that grows with the square of a word's length: 1,000 random letters take 0.1 s,
# 20,000 take 10 s.
MAX_WORD_CHARS: Final = 1_000
# Words whose merges are remembered; open_clip's tokeniser would remember every word for ever.
MAX_CACHED_WORDS: Final = 100_000
_LOWER: Final = get_clean_fn("lower")


def check_text(text: str) -> None:
    """Accept a text or say why not.

    Raises:
        TextError: empty, only white space, longer than `MAX_TEXT_CHARS`, with one word longer than
            `MAX_WORD_CHARS`, or not valid Unicode.
    """
    if not isinstance(text, str):
        raise TextError(f"a text is a string, not {type(text).__name__}")
    if len(text) > MAX_TEXT_CHARS:
        raise TextError(
            f"the text has {len(text):,} characters; at most {MAX_TEXT_CHARS:,} are taken",
            length=len(text),
            limit=MAX_TEXT_CHARS,
        )
    if not text.strip():
        raise TextError("the text is empty" if not text else "the text is only white space", length=len(text))
    if len(text) > MAX_WORD_CHARS:
        longest = max(map(len, text.split()))
        if longest > MAX_WORD_CHARS:
            raise TextError(
                f"one word of the text has {longest:,} characters; at most {MAX_WORD_CHARS:,} are taken",
                length=longest,
                limit=MAX_WORD_CHARS,
            )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text is not valid Unicode: {error.reason} at character {error.start}"
        ) from error


def without_waste(tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """The same tokens from open_clip's own tokeniser at bounded cost; other tokenisers as they are."""
    if type(tokenizer) is not SimpleTokenizer or tokenizer.reduction_fn is not None:
        return cast(Callable[[list[str]], Tensor], tokenizer)
    frugal = copy.copy(tokenizer)
    frugal.__class__ = FrugalTokenizer
    frugal.cache = dict(tokenizer.cache)
    frugal.known = {}
    return cast(Callable[[list[str]], Tensor], frugal)


class FrugalTokenizer(SimpleTokenizer):  # type: ignore[misc]
    """open_clip's tokeniser in a fraction of its time: it stops where the context is full, remembers the
    tokens of words (not for ever), and does not repair text that needs no repair."""

    cache: dict[str, str]
    known: dict[str, list[int]]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts → [B, L] int64, as open_clip's."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        tokens_BL = np.zeros((len(texts), length), np.int64)
        for tokens_L, text in zip(tokens_BL, texts, strict=True):
            tokens = [self.sot_token_id, *self._encode(text, length)][: length - 1]
            tokens_L[: len(tokens) + 1] = [*tokens, self.eot_token_id]
        return torch.from_numpy(tokens_BL)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without start and end; those beyond the context may be missing."""
        return self._encode(text, self.context_length)

    def _encode(self, text: str, enough: int) -> list[int]:
        if len(self.known) > MAX_CACHED_WORDS:
            self.known = {}
            self.cache = {special: special for special in map(self.decoder.__getitem__, self.all_special_ids)}
        tokens: list[int] = []
        for match in self.pat.finditer(self._clean(text)):
            word = match.group()
            found = self.known.get(word)
            if found is None:
                found = self.known[word] = self._tokens_of(word)
            tokens += found
            if len(tokens) >= enough:
                break
        return tokens

    def _tokens_of(self, word: str) -> list[int]:
        letters = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
        return [self.encoder[piece] for piece in self.bpe(letters).split(" ")]

    def _clean(self, text: str) -> str:
        # What open_clip repairs first (encodings, control characters, HTML entities) printable ASCII without
        # an ampersand cannot hold.
        if self.clean_fn is _LOWER and text.isascii() and text.isprintable() and "&" not in text:
            return " ".join(text.split()).lower()
        return cast(str, self.clean_fn(text))
