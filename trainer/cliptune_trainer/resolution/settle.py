"""From the spec's wishes to the sizes of every step, fitted to the model.

Enters: the spec's `[train.resolution]`, the model and the number of steps. Leaves: a `SizeSchedule`, with
what is to be told of it. Called by `decide`.

    progressive   sizes rise, and changes to images with them (EfficientNetV2: Tan & Le 2021, section 4); each
                  size before the last sees as many pixels as the others, so that most steps are small ones,
                  and a brief tail has the target (CLIPA: Li et al. 2023)
    multi_scale   a size drawn for each step, the same on all ranks
    finish        FixRes (Touvron et al. 2019): last steps with mild crops, for random crops enlarge objects
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.image_sizes import fitted
from cliptune_model.proven_sizes import Size, told
from cliptune_model.towers.image_tower import image_tower
from cliptune_trainer.image.augment import Augmentation
from cliptune_trainer.remark import Remark
from cliptune_trainer.resolution.rounding import fit_side
from cliptune_trainer.resolution.schedule import SizeSchedule, Stage
from cliptune_trainer.spec import Spec, wrong
from cliptune_trainer.spec.resolution import ResolutionConfig

# Of the target's side, where the spec names no sizes.
_PROGRESSIVE: Final = (0.5, 0.75, 1.0)
_MULTI_SCALE: Final = (0.5, 0.75, 1.0, 1.25, 1.5)
# Of the changes to images, what FixRes' last steps keep.
_MILD: Final = 0.25
_PATH: Final = "train.resolution.sizes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """The schedule, and what the user should know of it."""

    schedule: SizeSchedule
    choices: tuple[Choice, ...] = ()
    remarks: tuple[Remark, ...] = ()


def settle_sizes(spec: Spec, clip: Clip, total_steps: int) -> Settled:
    """The sizes of all steps.

    Raises:
        SpecError: fewer steps than stages, or sizes that become the same once they are rounded.
        InvalidInputError: a size that the model cannot take, or that `exact` forbids to round.
    """
    config, augment = spec.train.resolution, spec.data.augment
    if config.plain:
        return Settled(schedule=SizeSchedule.fixed(clip.image_size, augment, total_steps))
    remarks: list[Remark] = []
    sizes = _sizes(config, clip, remarks)
    target = sizes[-1] if config.schedule != "multi_scale" else _target(config, clip, sizes)
    finish_steps = round(config.finish_fraction * total_steps)
    steps = total_steps - finish_steps
    stages = _stages(config, sizes, augment, steps)
    if finish_steps:
        if config.finish_size is not None:
            path = "train.resolution.finish_size"
            target = fit_side(clip, config.finish_size, path, remarks, exact=config.exact)
        mild = augment.scaled(_MILD)
        stages.append(Stage(until=total_steps, sizes=(target,), augmentation=mild))
    stages = [
        stage
        for stage, began in zip(stages, [0, *(s.until for s in stages)], strict=False)
        if stage.until > began
    ]
    schedule = SizeSchedule(stages=tuple(stages), target=target, seed=spec.train.seed)
    return Settled(
        schedule=schedule,
        choices=(Choice(subject="image_size", value=_listed(stages), reason=_reason(config, target)),),
        remarks=tuple(remarks),
    )


def settle_sweep(spec: Spec, clip: Clip, schedule: SizeSchedule, remarks: list[Remark]) -> tuple[Size, ...]:
    """The sizes that the trained model is measured at, the target among them; none: no sweep.

    What was rounded is added to `remarks`.

    Raises:
        InvalidInputError: a size that the model cannot take.
    """
    config = spec.evaluation
    asked = {
        fit_side(clip, side, f"evaluation.resolutions[{place}]", remarks)
        for place, side in enumerate(config.resolutions)
    }
    trained = set(schedule.sizes) if len(schedule.sizes) > 1 else set[Size]()
    wanted = asked or trained
    wanted = wanted | {schedule.target} if wanted or config.degradations else wanted
    return tuple(sorted(wanted, key=lambda size: (size[0] * size[1], size)))


def _stages(
    config: ResolutionConfig, sizes: tuple[Size, ...], augment: Augmentation, steps: int
) -> list[Stage]:
    if config.schedule != "progressive" or len(sizes) == 1:
        return [
            Stage(
                until=steps,
                sizes=sizes if config.schedule == "multi_scale" else sizes[-1:],
                augmentation=augment,
            )
        ]
    if steps < len(sizes):
        allowed = f"at most as many as there are steps, {steps}"
        raise wrong(_PATH, f"{len(sizes)} sizes", allowed)
    # At least a step for each size.
    tail = min(max(round(config.tail_fraction * steps), 1), steps - len(sizes) + 1)
    rising = len(sizes) - 1
    shares = [1 / (height * width) for height, width in sizes[:-1]]
    stages: list[Stage] = []
    for place, size in enumerate(sizes):
        began = stages[-1].until if stages else 0
        until = round((steps - tail) * sum(shares[: place + 1]) / sum(shares))
        until = steps if place == rising else min(max(until, began + 1), steps - tail - (rising - 1 - place))
        share = config.first_augmentation + (1 - config.first_augmentation) * place / rising
        stages.append(Stage(until=until, sizes=(size,), augmentation=augment.scaled(share), strength=share))
    return stages


def _sizes(config: ResolutionConfig, clip: Clip, remarks: list[Remark]) -> tuple[Size, ...]:
    """Fitted to the model, rising."""
    if config.sizes:
        fits = [
            fit_side(clip, side, f"{_PATH}[{place}]", remarks, exact=config.exact)
            for place, side in enumerate(config.sizes)
        ]
        if len(set(fits)) < len(fits):
            step = image_tower(clip.model).step[0]
            shown = ", ".join(map(str, config.sizes))
            raise wrong(
                _PATH, f"{shown}, of which some are the same in multiples of {step}", "sizes further apart"
            )
        return tuple(fits)
    shares = {"progressive": _PROGRESSIVE, "multi_scale": _MULTI_SCALE}.get(config.schedule, (1.0,))
    height, width = clip.image_size
    step = max(image_tower(clip.model).step)
    found = {
        fitted(clip, (max(int(share * height), step), max(int(share * width), step))) for share in shares
    }
    return tuple(sorted(found))


def _target(config: ResolutionConfig, clip: Clip, sizes: tuple[Size, ...]) -> Size:
    """Of sizes that are all trained: the model's own, where it is among them."""
    return clip.image_size if clip.image_size in sizes else sizes[-1]


def _listed(stages: list[Stage]) -> str:
    parts, began = [], 0
    for stage in stages:
        sizes = ", ".join(map(told, stage.sizes))
        one = sizes if len(stage.sizes) == 1 else f"one of {sizes}"
        parts.append(f"{one} for {stage.until - began} steps")
        began = stage.until
    return "; ".join(parts)


def _reason(config: ResolutionConfig, target: Size) -> str:
    asked = "asked for" if config.sizes else "from the model's own size"
    where = f"evaluated and served at {told(target)}"
    return f"{config.schedule}, {asked}; {where}; the contrastive batch stays whole"
