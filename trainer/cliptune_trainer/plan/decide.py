"""What is settled before the first step: device, batch, length, learning rate, classes.

Enters: the spec, the data and the model. Leaves: `Decisions`, each automatic one with its reason. Called by
preparation, which shows them as the plan, and by `run`, which acts on them; both get the same. How a step is
computed on the device is settled next, in `planning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cliptune.domains import recipe
from cliptune.errors import DataError
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.machine.device import choose_proven_device, choose_threads
from cliptune_model.machine.hardware import Machine, detect
from cliptune_model.machine.proofs import Proofs
from cliptune_model.machine.rules import choose_precision
from cliptune_trainer.data.choices import choose_decode, choose_workers
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.data.remarks import about_data
from cliptune_trainer.evaluation.classes import decide_judging
from cliptune_trainer.plan.cautions import settings_to_mind
from cliptune_trainer.plan.learning_rate import choose_learning_rate
from cliptune_trainer.plan.loss_needs import check_loss
from cliptune_trainer.remark import Remark
from cliptune_trainer.resolution.schedule import Size, SizeSchedule
from cliptune_trainer.resolution.settle import settle_sizes, settle_sweep
from cliptune_trainer.spec import ClassConfig, Spec, wrong

USUAL_BATCH_SIZE: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Where the towers compute, and what `cliptune doctor` proved of it."""

    device: Choice
    threads: Choice
    machine: Machine
    proofs: Proofs


@dataclass(frozen=True, kw_only=True, slots=True)
class Decisions:
    """The settings of a run. `choices` are those that the spec left open; `remarks` are for the user."""

    hardware: Hardware
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    learning_rate: float
    classes: tuple[ClassConfig, ...]
    main_metric: str
    workers: int
    exact_decode: bool
    sizes: SizeSchedule
    sweep: tuple[Size, ...]
    choices: tuple[Choice, ...]
    remarks: tuple[Remark, ...]


def decide_hardware(spec: Spec, home: Path | None) -> Hardware:
    """Device and threads.

    Args:
        spec: the job.
        home: where doctor keeps its proofs; None: nothing is proved.

    Raises:
        InvalidInputError: a device that is not there or computes wrongly, or a precision that it lacks.
    """
    device, proofs = choose_proven_device(spec.resources.device, home)
    machine = detect(device.value)
    choose_precision(spec.train.precision, machine, proofs)  # refuses at once what is not to be had
    return Hardware(
        device=device, threads=choose_threads(spec.resources.threads), machine=machine, proofs=proofs
    )


def decide(
    spec: Spec, hardware: Hardware, dataset: Dataset, clip: Clip, *, resumed: bool = False
) -> Decisions:
    """Settles the rest. `resumed`: the model is no longer the one that training started from.

    Raises:
        SpecError: a batch of more rows than there are, no label of the data is among the spec's classes, or a
            learning rate at which nothing of the weights is left.
        InvalidInputError: an image size that the model cannot take.
        DataError: fewer than two rows to train on.
    """
    remarks = about_data(dataset, clip)
    choices = [hardware.device, hardware.threads]

    rows = len(dataset.train)
    batch_size = _batch_size(spec.train.batch_size, rows, choices)
    steps_per_epoch = rows // batch_size
    total_steps = steps_per_epoch * spec.train.epochs
    if spec.train.max_steps is not None:
        total_steps = min(total_steps, spec.train.max_steps)

    workers = choose_workers(spec.data.workers, hardware.device.value, rows)
    decode = choose_decode(spec.data.decode, hardware.device.value)
    choices += [workers, decode]

    settled = settle_sizes(spec, clip, total_steps)
    choices += settled.choices
    remarks += settled.remarks

    usual = choose_learning_rate(clip, rows=rows, total_steps=total_steps)
    learning_rate = spec.train.learning_rate
    if learning_rate is None:
        learning_rate = float(usual.value)
        choices.append(usual)
    if not resumed:
        remarks += settings_to_mind(
            spec,
            clip,
            dataset.train,
            learning_rate=learning_rate,
            usual=float(usual.value),
            total_steps=total_steps,
        )
    remarks += check_loss(spec, dataset.train, clip, batch_size=batch_size)
    # What the domain would rather measure gives way where the data cannot tell it; what the job asks, not.
    wished = recipe(spec.domain).evaluation.main_metric if spec.domain else ""
    judging = decide_judging(
        spec.evaluation,
        dataset,
        several_labels=bool(spec.data.label_separator),
        insist=spec.evaluation.main_metric != wished,
    )
    choices += judging.choices
    remarks += judging.remarks
    sweep = settle_sweep(spec, clip, settled.schedule, remarks)
    return Decisions(
        hardware=hardware,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        learning_rate=learning_rate,
        classes=judging.classes,
        main_metric=judging.main_metric,
        workers=int(workers.value),
        exact_decode=decode.value == "exact",
        sizes=settled.schedule,
        sweep=sweep,
        choices=tuple(choices),
        remarks=tuple(remarks),
    )


def _batch_size(wanted: int | None, rows: int, choices: list[Choice]) -> int:
    if rows < 2:
        raise DataError(f"{rows} rows to train on: a contrastive batch needs at least 2")
    if wanted is None:
        reason = "the usual one" if rows >= USUAL_BATCH_SIZE else f"there are no more than {rows} rows"
        value = min(USUAL_BATCH_SIZE, rows)
        choices.append(Choice(subject="batch_size", value=str(value), reason=reason))
        return value
    if wanted > rows:
        allowed = f"at most {rows}, the rows to train on; or leave it out, or train on more rows"
        raise wrong("train.batch_size", str(wanted), allowed)
    return wanted
