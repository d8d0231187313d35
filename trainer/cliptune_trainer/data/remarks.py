"""What a user should know of the data before training on it.

Enters: the data and the model that reads its captions. Leaves: `Remark`s, with the rows named. Called by
`decide`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast

from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_model.source import MAX_CONTEXT
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.data.leaks import told_leaks
from cliptune_trainer.data.listing import counted, listed, rows_listed
from cliptune_trainer.remark import Remark

# Captions that may be too long are tokenised up to here; of more, an even sample.
_MAX_TOKENISED: Final = 50_000
_TEXTS_AT_ONCE: Final = 1024
# Start, end, and what a tokeniser may put before the first word.
_SPECIAL_TOKENS: Final = 3
_ORDINARY: Final = "8-bit"


def about_data(dataset: Dataset, clip: Clip) -> list[Remark]:
    """All of them, the gravest first."""
    remarks = [
        *_leaks(dataset),
        *_skipped(dataset),
        *_depths(dataset),
        *_lonely_classes(dataset),
        *_cut_captions(dataset, clip),
    ]
    if dataset.copies:
        remarks.append(Remark(code="duplicate-images", message=dataset.copies))
    if not len(dataset.validation):
        remarks.append(
            Remark(code="no-validation", message="no validation rows: nothing is evaluated", warning=False)
        )
    return remarks


def _leaks(dataset: Dataset) -> Iterator[Remark]:
    if dataset.leaks:
        yield Remark(code="leakage", message=told_leaks(dataset.leaks))


def _skipped(dataset: Dataset) -> Iterator[Remark]:
    if dataset.bad:
        yield Remark(code="rows-skipped", message=dataset.bad_rows_message())


def _depths(dataset: Dataset) -> Iterator[Remark]:
    found: dict[str, tuple[int, str]] = {}
    for path, depths in dataset.findings.depths.items():
        for depth, (count, row) in depths.items():
            earlier, first = found.get(depth, (0, f"row {row} of {path}"))
            found[depth] = (earlier + count, first)
    if deep := sum(count for depth, (count, _) in found.items() if depth != _ORDINARY):
        window = dataset.train.reading.window
        yield Remark(
            code="deep-images",
            message=f"{counted(deep, 'image')} not of 8 bits, read with data.reading.window = {window!r}. A"
            " served model takes pictures of 8 bits (of 16 the high byte): bring what you send it to 8 bits"
            " in the same way",
            warning=False,
        )
    if len(found) > 1:
        told = [f"{count} are {depth} (the first is {first})" for depth, (count, first) in found.items()]
        yield Remark(
            code="mixed-bit-depths",
            message=f"images are of several bit depths: {listed(told)}. Pictures of 8 bits stay as they are,"
            " others are windowed: see that both look alike",
        )


def _lonely_classes(dataset: Dataset) -> Iterator[Remark]:
    images: dict[str, dict[str, int]] = {}
    for pair in dataset.train.pairs + dataset.validation.pairs:
        for label in pair.labels:
            images.setdefault(label, {}).setdefault(pair.identity, pair.row)
    alone = [
        f"{label!r} (row {next(iter(rows.values()))})" for label, rows in images.items() if len(rows) == 1
    ]
    if alone:
        yield Remark(
            code="class-of-one-image",
            message=f"{counted(len(alone), 'label')} with a single image, which cannot both train and"
            f" validate: {listed(alone)}",
        )


def _cut_captions(dataset: Dataset, clip: Clip) -> Iterator[Remark]:
    rows: dict[str, list[int]] = {}
    for pair in dataset.train.pairs + dataset.validation.pairs:
        for caption in pair.variants or (pair.caption,):
            # A token holds a byte at least: short captions need no tokeniser.
            if len(caption.encode()) > clip.context_length - _SPECIAL_TOKENS:
                rows.setdefault(caption, []).append(pair.row)
    captions = list(rows)
    every = -(-len(captions) // _MAX_TOKENISED) or 1
    cut = list(_overlong(captions[::every], clip))
    if cut:
        places = sorted({row for caption in cut for row in rows[caption]})
        about = ("about " if every > 1 else "") + counted(len(cut) * every, "caption")
        yield Remark(
            code="captions-cut",
            message=f"{about} of more than the {clip.context_length} tokens that the model reads, cut there:"
            f" {rows_listed(places)}; with model.context_length, up to {MAX_CONTEXT}, it reads more",
        )


def _overlong(texts: Sequence[str], clip: Clip) -> Iterator[str]:
    """Texts that lose tokens at the model's context length: with room for one more token they have it."""
    tokenize = cast(Callable[..., Tensor], clip.tokenizer)
    length = clip.context_length
    padding: Any = tokenize(["a"], context_length=length + 1)[0, -1] if texts else None
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        cut_BL = tokenize(part, context_length=length)
        longer_BL = tokenize(part, context_length=length + 1)
        lost_B = (longer_BL[:, length] != padding) | (longer_BL[:, :length] != cut_BL).any(dim=1)
        yield from (text for text, lost in zip(part, lost_B.tolist(), strict=True) if lost)
