"""ImageNet's 1,000 classes in words, as timm lists them (WordNet's lemmas and definitions).

Enters: nothing. Leaves: `ImageClass`es in the classifier's order. Called by `prepare` and the image steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from timm.data.imagenet_info import ImageNetInfo

from scripts.mini.trunk import CLASSES


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageClass:
    """One row of the classifier."""

    lemmas: tuple[str, ...]
    definition: str

    @property
    def captions(self) -> tuple[str, ...]:
        """What one might write below a photo of it; the plainest first."""
        named = [f"a {lemma}" for lemma in self.lemmas]
        photos = [f"a photo of a {lemma}" for lemma in self.lemmas]
        return (*named, *photos, self.definition)


def image_classes() -> list[ImageClass]:
    """All, in the order of the classifier's rows."""
    info = ImageNetInfo()
    found = []
    for index in range(CLASSES):
        words, _, definition = info.index_to_description(index, detailed=True).partition(": ")
        lemmas = tuple(word.strip() for word in words.split(","))
        found.append(ImageClass(lemmas=lemmas, definition=definition))
    return found
