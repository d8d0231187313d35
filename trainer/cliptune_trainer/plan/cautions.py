"""Settings that are known to destroy what a pretrained model knows: the worst are refused, others warned of.

Enters: the spec, the model, and what was decided. Leaves: `Remark`s. Called by `decide`, so that they are
told before the job waits for a device. A model with random weights has nothing to lose: only what makes
captions untrue is told of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cliptune_model.clip import Clip
from cliptune_model.manifest import MANIFEST_FILE, read_manifest
from cliptune_model.similarity import DEFAULT
from cliptune_model.source import LOCAL_DIR
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.image.augment import Augmentation
from cliptune_trainer.plan.learning_rate import weight_size
from cliptune_trainer.remark import Remark
from cliptune_trainer.schedule import Schedule
from cliptune_trainer.spec import Spec, wrong

# Times the rate that would be chosen, from which on a pretrained model mostly forgets.
_FORGETTING: Final = 10.0
# Times that rate, from which on the first steps need a warm-up.
_NEEDS_WARMUP: Final = 3.0
_LONG_WARMUP: Final = 0.5
# Share of every weight that decay may take away over a run.
_MUCH_DECAY: Final = 0.1
# By so much a first logit scale may differ from the model's own.
_OTHER_SCALE: Final = 2.0
_LISTED: Final = 5

_SIDES: Final = re.compile(r"\b(left|right|leftward|rightward|clockwise|counterclockwise)\b", re.IGNORECASE)
_HEIGHTS: Final = re.compile(r"\b(top|bottom|upper|lower|above|below|upside)\b", re.IGNORECASE)
_COLOURS: Final = re.compile(
    r"\b(red|green|blue|yellow|orange|purple|violet|pink|brown|cyan|magenta|turquoise|golden)\b",
    re.IGNORECASE,
)
_COUNTS: Final = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|several|many|few"
    r"|\d+ ([\w-]+ ){0,2}\w+s)\b",  # 19 red blood cells, but neither "number 3" nor "2019"
    re.IGNORECASE,
)
# What is lost of a picture, or turned of its colours, before a word may become untrue.
_MILD_CROP: Final = 0.9
_MILD_HUE: Final = 0.05
_MILD_SATURATION: Final = 0.5
_MILD_TURN_DEGREES: Final = 45.0


def settings_to_mind(
    spec: Spec, clip: Clip, train: Pairs, *, learning_rate: float, usual: float, total_steps: int
) -> list[Remark]:
    """What the user should think again about.

    Args:
        spec: the job.
        clip: as training starts from it.
        train: the training rows.
        learning_rate: the peak.
        usual: the peak that would be chosen.
        total_steps: of the run.

    Raises:
        SpecError: a learning rate at which every weight is lost in one step.
    """
    remarks = list(_untrue_captions(spec.data.augment, train))
    if clip.pretrained:
        # Decay draws an adapter to nothing, and the model to what it was.
        decays = clip.adapter is None
        remarks += [
            *_rate(clip, learning_rate, usual),
            *_warmup(spec, learning_rate, usual),
            *(_decay(spec, learning_rate, total_steps) if decays else ()),
            *_scale(spec, clip),
            *_similarity(spec, clip),
        ]
    return remarks


def _rate(clip: Clip, learning_rate: float, usual: float) -> Iterator[Remark]:
    size = weight_size(clip.model)
    if size and learning_rate >= size:
        raise wrong(
            "train.learning_rate",
            f"{learning_rate:g}, and the pretrained weights are about {size:.2g} large: AdamW moves each by"
            " up to the learning rate, so that nothing of them is left after a step",
            f"below {size:.2g}; {usual:g} is what would be chosen",
        )
    if learning_rate >= _FORGETTING * usual:
        yield Remark(
            code="learning-rate-high",
            message=f"train.learning_rate = {learning_rate:g} is a rate for random weights: pretrained ones"
            f" mostly forget what they know at it; {usual:g} is the usual one here",
        )


def _warmup(spec: Spec, learning_rate: float, usual: float) -> Iterator[Remark]:
    fraction = spec.train.warmup_fraction
    if fraction == 0 and learning_rate >= _NEEDS_WARMUP * usual:
        yield Remark(
            code="no-warmup",
            message=f"train.warmup_fraction = 0 at a learning rate of {learning_rate:g}: AdamW's first steps"
            " move every weight by the whole rate, whatever its gradient; 0.1 is usual",
        )
    if fraction > _LONG_WARMUP:
        yield Remark(
            code="long-warmup",
            message=f"train.warmup_fraction = {fraction:g}: most of the run is over before the learning rate"
            " reaches its peak, as where a warm-up of a long pretraining is taken over; 0.1 is usual",
        )


def _decay(spec: Spec, learning_rate: float, total_steps: int) -> Iterator[Remark]:
    schedule = Schedule(
        shape=spec.train.schedule, total_steps=total_steps, warmup_fraction=spec.train.warmup_fraction
    )
    # Of a long run an even sample of steps.
    every = max(total_steps // 1000, 1)
    rates = every * sum(learning_rate * schedule.share(step) for step in range(0, total_steps, every))
    lost = 1 - math.exp(-spec.train.weight_decay * rates)
    if lost > _MUCH_DECAY:
        yield Remark(
            code="weight-decay-strong",
            message=f"train.weight_decay = {spec.train.weight_decay:g} takes {lost:.0%} of every weight away"
            " over this run, pretrained ones too; 0.1 to 0.2 at a fine-tuning rate is usual",
        )


def _scale(spec: Spec, clip: Clip) -> Iterator[Remark]:
    stored = getattr(clip.model, "logit_scale", None)
    if stored is None:
        return
    own = float(stored.detach().exp())
    asked = spec.loss.logit_scale
    if asked is not None and not 1 / _OTHER_SCALE <= asked / own <= _OTHER_SCALE:
        yield Remark(
            code="logit-scale-reset",
            message=f"loss.logit_scale = {asked:g}, but the model was trained to {own:.3g}: its embeddings"
            " fit that one, and are moved until they fit the other",
        )
    if asked is None and spec.loss.max_logit_scale < own / _OTHER_SCALE:
        yield Remark(
            code="logit-scale-reset",
            message=f"loss.max_logit_scale = {spec.loss.max_logit_scale:g} is far below the {own:.3g} that"
            " the model was trained to: its embeddings fit that one, and are moved until they fit the other",
        )


def _similarity(spec: Spec, clip: Clip) -> Iterator[Remark]:
    own = DEFAULT
    folder = Path(spec.model.name.removeprefix(LOCAL_DIR)).expanduser()
    if spec.model.name.startswith(LOCAL_DIR) and (folder / MANIFEST_FILE).is_file():
        own = read_manifest(folder).similarity
    if clip.similarity.name != own:
        yield Remark(
            code="similarity-changed",
            message=f"model.similarity = {clip.similarity.name!r}, but the model was trained by {own}: its"
            " embeddings are learned anew, and zero-shot metrics begin lower than they were",
        )


def _untrue_captions(augment: Augmentation, train: Pairs) -> Iterator[Remark]:
    """Captions that a random change may make untrue, by their words (English ones)."""
    turned = augment.rotate_quarter or augment.rotate_degrees > _MILD_TURN_DEGREES
    checks: list[tuple[bool, re.Pattern[str], str]] = [
        (augment.flip_horizontal or turned, _SIDES, "sides, and flips or turns change them"),
        (augment.flip_vertical or turned, _HEIGHTS, "what is above or below, and flips or turns change it"),
        (
            augment.hue > _MILD_HUE or augment.saturation > _MILD_SATURATION,
            _COLOURS,
            "colours, and data.augment changes hue or saturation",
        ),
        (augment.crop_min_area < _MILD_CROP, _COUNTS, "a number of things, and crops cut some off"),
    ]
    for done, words, why in checks:
        if done and (rows := _rows_with(words.search, train)):
            more = f" and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
            yield Remark(
                code="augmentation-contradicts-captions",
                message=f"{len(rows)} training captions tell of {why}: rows"
                f" {', '.join(map(str, rows[:_LISTED]))}{more}; see data.augment",
            )


def _rows_with(found: Callable[[str], object], train: Pairs) -> list[int]:
    return [pair.row for pair in train.pairs if any(map(found, pair.variants or (pair.caption,)))]
