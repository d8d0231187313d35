"""What the spec's columns make of a row: captions, labels, group and split, checked alike for every form.

Enters: a row's fields by name. Leaves: its `Pair`s, or an `UnusableRow` that says why there are none. Called
by the readers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeAlias

from cliptune.errors import CliptuneError, MissingColumnError
from cliptune.spec_shape import LABEL_PLACE
from cliptune_model.tokens import check_text
from cliptune_trainer.data.source import ImageSource
from cliptune_trainer.data.table import Pair
from cliptune_trainer.spec import DataConfig
from cliptune_trainer.spec.evaluation import DEFAULT_TEMPLATES

SPLITS: Final = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
# What a field holds: one text, or several.
Value: TypeAlias = str | Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """How labels are put into words where a row has no caption.

    Attributes:
        names: what labels are called.
        templates: of the captions of a folder of images, unless the spec gives other ones: those of the
            prompts, so that training and evaluation say the same (FLYP; Goyal et al. 2023, section 3).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


class UnusableRow(Exception):  # noqa: N818 - says why, and goes no further
    """Why a row is left out."""


class Columns:
    """The columns of one table.

    Args:
        config: names them.
        wording: of captions made from labels.
        captions_from_labels: rows have no captions of their own, as in a folder of images.
    """

    def __init__(
        self,
        config: DataConfig,
        wording: Wording,
        *,
        captions_from_labels: bool = False,
    ) -> None:
        self._config, self._label_names = config, wording.names
        templates = config.caption_templates
        if captions_from_labels and not templates:
            templates = wording.templates
        self._templates = templates
        # Rows of the same labels share their captions.
        self._from_labels = lru_cache(maxsize=None)(self._fill)
        # Field of the spec → column. Captions may be missing where templates make them from labels.
        wanted = {"caption_column": config.caption_column} if not templates else {}
        wanted |= {
            name: column
            for name, column in (
                ("label_column", config.label_column),
                ("split_column", config.split_column),
                ("group_column", config.group_column),
            )
            if column
        }
        self.wanted: dict[str, str] = wanted
        self._seen: set[str] = set()

    @property
    def fingerprint(self) -> str:
        """Of all that decides what a row's fields mean."""
        config = self._config
        names = (config.caption_column, config.label_column, config.split_column, config.group_column)
        meaning = (*names, config.label_separator, self._templates, sorted(self._label_names.items()))
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def pairs(
        self, row: int, image: ImageSource, reference: str, fields: Mapping[str, Value], *, split: str = ""
    ) -> list[Pair]:
        """A row's pairs, one for each caption. `split`: the name of the folder or file that it lies in.

        Raises:
            UnusableRow: a caption is no text that a model can take, there is none, or the split is unknown.
        """
        config = self._config
        self.note(fields)
        for value in fields.values():
            for text in (value,) if isinstance(value, str) else value:
                if "\ufffd" in text or "\0" in text:
                    raise UnusableRow("not UTF-8 text")
        labels = self._labels(fields.get(config.label_column, "") if config.label_column else "")
        captions = [caption for caption in _several(fields.get(config.caption_column, "")) if caption]
        variants: tuple[str, ...] = ()
        if not captions and labels and self._templates:
            variants = self._from_labels(labels)
            captions = [variants[0]]
        try:
            for caption in captions or [""]:
                check_text(caption)
        except CliptuneError as error:
            raise UnusableRow(f"caption: {error.message}") from error
        if config.split_column:
            split = _one(fields.get(config.split_column, "")).lower()
            if split not in SPLITS:
                raise UnusableRow(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
        group = _one(fields.get(config.group_column, "")) if config.group_column else ""
        return [
            Pair(
                row=row,
                image=image,
                reference=reference,
                caption=caption,
                labels=labels,
                group=group,
                split=SPLITS.get(split.lower(), ""),
                variants=variants if len(variants) > 1 else (),
            )
            for caption in dict.fromkeys(captions)
        ]

    def note(self, names: Iterable[str]) -> None:
        """Remembers which columns a row has; `pairs` does so itself."""
        self._seen.update(names)

    def check(self, found: Iterable[str], file: Path | str, *, image: bool = True) -> None:
        """Raises MissingColumnError when a column of the spec is not among those that the table has."""
        has = list(found)
        wanted = {"image_column": self._config.image_column, **self.wanted} if image else self.wanted
        for name, column in wanted.items():
            if column not in has:
                told = ", ".join(has)
                raise MissingColumnError(
                    f"{file} has no column {column!r} (data.{name}); it has: {told}",
                    column=column,
                    found=told,
                    file=file,
                    path=f"data.{name}",
                )

    def check_seen(self, file: Path | str, *, image: bool = True) -> None:
        """As `check`, of a form without a header: a column must be in one row at least."""
        self.check(sorted(self._seen), file, image=image)

    def _labels(self, value: Value) -> tuple[str, ...]:
        separator = self._config.label_separator
        if isinstance(value, str):
            texts: Sequence[str] = value.split(separator) if separator else [value]
        else:
            texts = value
        return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))

    def _fill(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        names = [self._label_names.get(label, label) for label in labels]
        told = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return tuple(dict.fromkeys(template.replace(LABEL_PLACE, told) for template in self._templates))


def value_of(value: object) -> Value | None:
    """A field of JSON or parquet as text; None for what is no text, number or list of them."""
    if isinstance(value, list | tuple):
        texts = [value_of(entry) for entry in value]
        return [text for text in texts if isinstance(text, str) and text]
    if isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value).strip() if isinstance(value, str | int | float) else None


def _several(value: Value) -> list[str]:
    return [value.strip()] if isinstance(value, str) else [text.strip() for text in value]


def _one(value: Value) -> str:
    return value.strip() if isinstance(value, str) else ", ".join(value)
