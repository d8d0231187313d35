"""Texts to teach a text tower on: words, definitions, examples of use, captions, and compositions of them.

Enters: a `Lexicon`, made by `prepare`. Leaves: as many random sentences as wished. Called by `texts`. A tower
that is to answer any caption has to hear nearly every word of the language, alone and in company.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scripts.mini.wordnet import Synset

COLOURS: Final = [
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "violet",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
    "golden",
    "silver",
    "beige",
    "turquoise",
    "dark",
    "light",
    "pale",
    "bright",
]
NUMBERS: Final = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "several",
    "many",
    "some",
    "a",
    "few",
]
QUALITIES: Final = [
    "small",
    "large",
    "big",
    "tiny",
    "huge",
    "old",
    "new",
    "young",
    "round",
    "square",
    "long",
    "short",
    "tall",
    "flat",
    "wooden",
    "metal",
    "plastic",
    "glass",
    "paper",
    "wet",
    "dry",
    "broken",
    "open",
    "closed",
    "empty",
    "full",
    "happy",
    "sad",
    "angry",
    "sleeping",
    "flying",
    "running",
    "sitting",
    "swimming",
    "standing",
    "striped",
    "spotted",
    "furry",
    "shiny",
    "cartoon",
    "cute",
    "wild",
    "domestic",
    "antique",
    "modern",
    "toy",
    "healthy",
    "damaged",
    "normal",
    "abnormal",
    "functional",
    "defective",
    "dense",
    "sparse",
    "stained",
]
PLACES: Final = [
    "in the grass",
    "in the water",
    "on a table",
    "on a plate",
    "in the snow",
    "on the beach",
    "in a garden",
    "in the forest",
    "in a box",
    "on a branch",
    "in the sky",
    "at night",
    "in a field",
    "on the road",
    "on a white background",
    "in the city",
    "by the sea",
    "under a microscope",
    "in a cage",
    "on a wall",
    "in front of a house",
    "from above",
    "from the side",
    "close up",
]
PICTURES: Final = [
    "photo",
    "picture",
    "image",
    "drawing",
    "painting",
    "sketch",
    "clip art",
    "cartoon",
    "icon",
    "emoji",
    "illustration",
    "close-up",
    "photograph",
    "black and white photo",
    "rendering",
    "micrograph",
    "microscope image",
    "sculpture",
    "toy",
    "logo",
    "sign",
    "symbol",
    "silhouette",
]
JOINS: Final = (
    "and",
    "with",
    "on",
    "in",
    "near",
    "next to",
    "behind",
    "eating",
    "holding",
    "under",
    "over",
    "of",
)
_COMMON: Final = 4
_WORD: Final = re.compile(r"[a-z]+")
_EXAMPLE: Final = re.compile(r'"([^"]{8,})"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Lexicon:
    """What sentences are made of."""

    visible: tuple[str, ...]
    """Nouns that a picture can show."""
    common: tuple[str, ...]
    """Those of them that WordNet itself uses to explain others."""
    words: tuple[str, ...]
    """All other lemmas."""
    adjectives: tuple[str, ...]
    definitions: tuple[str, ...]
    examples: tuple[str, ...]
    captions: tuple[str, ...]

    @classmethod
    def of(cls, synsets: Sequence[Synset], examples: Sequence[str], captions: Sequence[str]) -> Lexicon:
        """From WordNet and the captions of the training images."""
        visible = {lemma for synset in synsets if synset.visible for lemma in synset.lemmas}
        others = {lemma for synset in synsets for lemma in synset.lemmas} - visible
        used = Counter(word for synset in synsets for word in _WORD.findall(synset.definition.lower()))
        adjectives = {lemma for synset in synsets if synset.part == "adj" for lemma in synset.lemmas}
        return cls(
            visible=tuple(sorted(visible)),
            common=tuple(sorted(lemma for lemma in visible if used[lemma] >= _COMMON)),
            words=tuple(sorted(others)),
            adjectives=tuple(sorted(adjectives)),
            definitions=tuple(synset.definition for synset in synsets),
            examples=tuple(examples),
            captions=tuple(captions),
        )


def examples(lines: Sequence[str]) -> list[str]:
    """The quoted examples of use in WordNet's glosses."""
    return [found for line in lines for found in _EXAMPLE.findall(line.partition(" | ")[2])]


def every(lexicon: Lexicon) -> list[str]:
    """Each word, definition, example and caption once."""
    return [
        *(with_article(noun) for noun in lexicon.visible),
        *lexicon.words,
        *lexicon.definitions,
        *lexicon.examples,
        *lexicon.captions,
    ]


def compose(lexicon: Lexicon, count: int, seed: int) -> list[str]:
    """`count` random compositions, the same for the same seed."""
    rng = random.Random(seed)
    return [_dressed(_sentence(lexicon, rng), rng) for _ in range(count)]


def with_article(noun: str) -> str:
    """ "a frog", "an owl"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _sentence(lexicon: Lexicon, rng: random.Random) -> str:
    noun, other = (rng.choice(rng.choice((lexicon.visible, lexicon.common))) for _ in range(2))
    match rng.randrange(16):
        case 0 | 1 | 2:
            return f"{with_article(rng.choice(PICTURES))} of {with_article(noun)}"
        case 3 | 4:
            return with_article(f"{rng.choice(COLOURS)} {noun}")
        case 5 | 6:
            return with_article(f"{rng.choice(QUALITIES)} {noun}")
        case 7:
            return with_article(f"{rng.choice(lexicon.adjectives)} {noun}")
        case 8:
            return f"{with_article(noun)} {rng.choice(PLACES)}"
        case 9 | 10:
            return f"{with_article(noun)} {rng.choice(JOINS)} {with_article(other)}"
        case 11:
            return f"{rng.choice(NUMBERS)} {noun}s"
        case 12:
            return f"{noun}, {other}, {rng.choice(lexicon.words)}"
        case 13:
            picture = rng.choice(PICTURES)
            thing = with_article(f"{rng.choice(QUALITIES)} {noun}")
            return f"{with_article(picture)} of {thing} {rng.choice(PLACES)}"
        case 14:
            return rng.choice(lexicon.captions)
        case _:
            parts = rng.sample(lexicon.definitions, rng.choice((1, 1, 2, 3, 5)))
            return ". ".join(parts)


def _dressed(sentence: str, rng: random.Random) -> str:
    """As people write it: with a capital or not, with a full stop or not."""
    choice = rng.randrange(6)
    if choice == 0:
        return sentence[:1].upper() + sentence[1:] + "."
    if choice == 1:
        return sentence[:1].upper() + sentence[1:]
    return sentence + "." if choice == 2 else sentence
