"""A frozen tower's features, once for the whole run, as LiT may have them (Zhai et al. 2022).

Enters: the model, the training rows and what they look like to each step. Leaves: choices for the plan, and
`KnownFeatures` for the loader. Called by preparation and by `run`, before the first step.

A frozen tower is in evaluation mode and draws nothing: what it makes of a text is the same each time, and of
an image as long as nothing about the image is drawn. All are computed in one order in parts of one size, so
that a resumed run looks up the bits that its first attempt did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from cliptune.errors import CliptuneError
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.loading.decode import Decoder, reason
from cliptune_trainer.data.loading.images import Normalisation
from cliptune_trainer.data.loading.known import KnownFeatures
from cliptune_trainer.image.augment import NONE
from cliptune_trainer.resolution.schedule import SizeSchedule
from cliptune_trainer.spec import Spec
from cliptune_trainer.steps.precision import Precision

# Of one tower. A larger table takes room from the steps that it is to make cheaper.
LIMIT_BYTES: Final = 256 << 20
_KEPT: Final = "computed once"
_ANEW: Final = "computed in each step"


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenPlan:
    """Which towers' features are computed once, and why or why not."""

    images: bool
    texts: bool
    choices: tuple[Choice, ...]


def plan_frozen(spec: Spec, pairs: Pairs, clip: Clip, sizes: SizeSchedule, *, rows_seen: int) -> FrozenPlan:
    """Decides it.

    Args:
        spec: the job.
        pairs: the training rows.
        clip: the model.
        sizes: of images, with their augmentation.
        rows_seen: pairs of all steps together.
    """
    width_bytes = 4 * clip.embedding_dim
    images = texts = ""
    choices: list[Choice] = []
    if spec.train.freeze_image:
        changed = len(sizes.sizes) > 1 or any(stage.augmentation != NONE for stage in sizes.stages)
        why = "images are changed from step to step" if changed else ""
        count = len(set(pairs.image_ids.tolist()))
        images = why or _against(count, "image", width_bytes, rows_seen)
        choices.append(_choice("image features", images, count, width_bytes))
    if spec.train.freeze_text:
        count = len(texts_of(pairs))
        texts = _against(count, "text", width_bytes, rows_seen)
        choices.append(_choice("text features", texts, count, width_bytes))
    return FrozenPlan(
        images=spec.train.freeze_image and not images,
        texts=spec.train.freeze_text and not texts,
        choices=tuple(choices),
    )


def know(
    clip: Clip,
    pairs: Pairs,
    plan: FrozenPlan,
    precision: Precision,
    *,
    size: tuple[int, int],
    exact: bool,
    rows: int,
    check: Callable[[], bool],
) -> KnownFeatures:
    """Computes what the plan says.

    Args:
        clip: with its frozen towers frozen; its mode is restored afterwards.
        pairs: the training rows.
        plan: of this job.
        precision: of the steps.
        size: of the images, height and width.
        exact: images are decoded as open_clip's evaluation does, to the bit.
        rows: of a pass.
        check: whether to leave it; asked between passes. Steps then compute what is not known.

    Raises:
        DataError, ImageDecodeError, OSError: an image cannot be read.
    """
    modes = [(module, module.training) for module in clip.model.modules()]
    clip.model.eval()
    try:
        images_ID = _images(clip, pairs, precision, size, exact, rows, check) if plan.images else None
        texts = texts_of(pairs) if plan.texts else []
        texts_TD = _texts(clip, texts, precision, rows, check) if plan.texts else None
    finally:
        for module, training in modes:
            module.training = training
    rows_of = None if texts_TD is None else {text: row for row, text in enumerate(texts)}
    return KnownFeatures(images_ID=images_ID, texts_TD=texts_TD, text_rows=rows_of)


def texts_of(pairs: Pairs) -> list[str]:
    """Every text that may be drawn, the short ones first."""
    found = {text for pair in pairs.pairs for text in (pair.variants or (pair.caption,))}
    return sorted(found, key=lambda text: (len(text), text))


def unreadable(error: CliptuneError | OSError) -> str:
    """For a notice: why features of images are not known after all."""
    why = reason(error)
    return f"an image cannot be read any more ({why}): the image tower computes its features in each step"


def _against(count: int, what: str, width_bytes: int, rows_seen: int) -> str:
    """Why not; "": nothing is against it."""
    if count >= rows_seen:
        return f"no {what} is seen twice: {count:,} of them in {rows_seen:,} pairs"
    if count * width_bytes > LIMIT_BYTES:
        return (
            f"{count:,} {what}s would take {count * width_bytes >> 20:,} MiB, more than {LIMIT_BYTES >> 20}"
        )
    return ""


def _choice(subject: str, against: str, count: int, width_bytes: int) -> Choice:
    if against:
        return Choice(subject=subject, value=_ANEW, reason=against)
    mib = count * width_bytes / (1 << 20)
    told = f"the tower is frozen, and makes the same of each: {count:,} of them take {mib:.1f} MiB"
    return Choice(subject=subject, value=_KEPT, reason=told)


@torch.no_grad()
def _images(
    clip: Clip,
    pairs: Pairs,
    precision: Precision,
    size: tuple[int, int],
    exact: bool,
    rows: int,
    check: Callable[[], bool],
) -> Tensor | None:
    decoder = Decoder.of(clip.preprocess_config | {"size": size}, exact=exact, reading=pairs.reading)
    normalise_pixels = Normalisation.of(clip.preprocess_config, clip.device)
    _, first_rows = np.unique(pairs.image_ids, return_index=True)

    def encode(places: Sequence[int]) -> Tensor:
        shown = [pairs.pairs[first_rows[place]] for place in places]
        pixels_BHW3 = np.stack([decoder(pair.image, 0, pair.row) for pair in shown])
        return clip.encode_images(normalise_pixels(torch.from_numpy(pixels_BHW3)))

    return _in_parts(clip, len(first_rows), encode, precision, rows, check)


@torch.no_grad()
def _texts(
    clip: Clip, texts: Sequence[str], precision: Precision, rows: int, check: Callable[[], bool]
) -> Tensor | None:
    def encode(places: Sequence[int]) -> Tensor:
        tokens_BL = clip.tokenize_trimmed([texts[place] for place in places])
        return clip.encode_texts(tokens_BL.to(clip.device))

    return _in_parts(clip, len(texts), encode, precision, rows, check)


def _in_parts(
    clip: Clip,
    count: int,
    encode: Callable[[Sequence[int]], Tensor],
    precision: Precision,
    rows: int,
    check: Callable[[], bool],
) -> Tensor | None:
    table_ND = torch.empty(count, clip.embedding_dim, device=clip.device)
    for start in range(0, count, rows):
        if check():
            return None
        places = range(start, min(start + rows, count))
        with precision.autocast():
            table_ND[places.start : places.stop] = encode(places)
    return table_ND
