"""More general names of ImageNet's classes: a bulbul is a bird, a sorrel a horse.

Enters: WordNet's nouns, the classes and the words that are common. Leaves: `general.json`, a list of names
with articles for each class, written by `prepare` and read by the image steps. Whoever writes a caption calls
most things by such a name (Rosch et al. 1976, basic level), and the classifier's own are finer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from scripts.mini.classes import ImageClass
from scripts.mini.sentences import with_article
from scripts.mini.wordnet import Synset

# Above so many of the 1,000 classes a name tells nothing: an animal, an artefact.
_TOO_GENERAL: Final = 130
_LEVELS: Final = 8
_LEMMAS: Final = 2


def general_names(
    synsets: Collection[Synset], classes: Sequence[ImageClass], common: Collection[str]
) -> list[tuple[str, ...]]:
    """For each class the words above it in WordNet that are common and not too general, the nearest first."""
    nouns = {synset.offset: synset for synset in synsets if synset.part == "noun"}
    by_lemma: dict[str, list[Synset]] = {}
    for synset in nouns.values():
        for lemma in synset.lemmas:
            by_lemma.setdefault(lemma.lower(), []).append(synset)
    above = [list(dict.fromkeys(_above(_synset(one, by_lemma), nouns))) for one in classes]
    covered = Counter(synset.offset for found in above for synset in found)
    return [
        tuple(_named(one, [s for s in found if s.visible and covered[s.offset] <= _TOO_GENERAL], common))
        for one, found in zip(classes, above, strict=True)
    ]


def write(names: Sequence[Sequence[str]], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(names), encoding="utf-8")


def read(path: Path) -> list[tuple[str, ...]]:
    """Inverse of `write`."""
    return [tuple(names) for names in json.loads(path.read_text(encoding="utf-8"))]


def _synset(one: ImageClass, by_lemma: Mapping[str, list[Synset]]) -> Synset:
    """The meaning with the class's words and most like its definition: offsets differ between versions.

    Raises:
        ValueError: WordNet has none of its words.
    """
    candidates = [synset for lemma in one.lemmas for synset in by_lemma.get(lemma.lower(), [])]
    if not candidates:
        raise ValueError(f"WordNet has none of {', '.join(one.lemmas)}")
    lemmas, definition = {lemma.lower() for lemma in one.lemmas}, _words(one.definition)

    def alike(synset: Synset) -> float:
        theirs, told = {lemma.lower() for lemma in synset.lemmas}, _words(synset.definition)
        return len(lemmas & theirs) / len(lemmas | theirs) + 2 * len(definition & told) / max(
            1, len(definition | told)
        )

    return max(candidates, key=alike)


def _above(synset: Synset, nouns: Mapping[int, Synset]) -> Iterator[Synset]:
    level = [synset]
    for _ in range(_LEVELS):
        level = [nouns[offset] for one in level for offset in one.more_general if offset in nouns]
        yield from level


def _named(one: ImageClass, above: Sequence[Synset], common: Collection[str]) -> Iterator[str]:
    own = {lemma.lower() for lemma in one.lemmas}
    found = (lemma for synset in above for lemma in synset.lemmas[:_LEMMAS])
    yield from dict.fromkeys(
        with_article(lemma) for lemma in found if lemma in common and lemma.lower() not in own
    )


def _words(text: str) -> set[str]:
    return set("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())
