"""The parts of a step, put together as a plan says: towers in its form, objective, optimizer, compilation.

Enters: a spec, a model and its plans. Leaves: an `Assembly`, whose step can be taken. Called by the stepper,
and by benchmarks that measure what a job does.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch.optim import AdamW

from cliptune_model.acceleration.compiled import Compilation, compile_towers
from cliptune_model.acceleration.lean import make_lean
from cliptune_model.attention import install
from cliptune_model.clip import Clip
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.losses.temperature import hold
from cliptune_trainer.memory.limit import limit_process
from cliptune_trainer.plan.execution import Execution
from cliptune_trainer.plan.per_size import Executions
from cliptune_trainer.spec import Spec
from cliptune_trainer.steps.batch_norm import FROZEN, BatchNorms, choose_batch_norm, has_batch_norm
from cliptune_trainer.steps.checkpointing import enable_checkpointing
from cliptune_trainer.steps.half_weights import HalfWeights, choose_half_weights
from cliptune_trainer.steps.larger_parts import passes_of
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step
from cliptune_trainer.steps.teacher import StartingModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """A step, and the parts of it that a checkpoint keeps or a person is told of.

    Attributes:
        exact_in_parts: the gradient is that of the batch at every micro-batch; false where parts are
            normalised by statistics of their own.
    """

    step: Step
    objective: Objective
    optimizer: AdamW
    precision: Precision
    compilation: Compilation
    exact_in_parts: bool


def assemble(
    spec: Spec,
    clip: Clip,
    executions: Executions,
    *,
    batch_size: int,
    learning_rate: float,
    teacher: Clip | None = None,
) -> Assembly:
    """The step of the largest size. From here on the process keeps to the plan's budget.

    Args:
        spec: the job.
        clip: the model, on its device, as planned for. Attention, checkpointing and compilation are put in.
        executions: the plans, one for each size of images; what all of them need is compiled.
        batch_size: pairs of a step.
        learning_rate: of the first step.
        teacher: the model as training began, for objectives that need it; of the same device.
    """
    execution = executions.common
    plan = execution.plan
    limit_process(clip.device, plan.budget_bytes)
    precision = Precision(execution.precision, clip.device)
    objective = execution.objective(spec.loss, clip.similarity).to(clip.device)
    hold(clip.model, spec.loss)
    optimizer = build_optimizer(
        clip.model,
        learning_rate=learning_rate,
        weight_decay=spec.train.weight_decay,
        scaled=precision.scaler is not None,
        fused=execution.policy.fuses,
        beside={"similarity": clip.similarity, "loss": objective},
        layer_decay=spec.train.layer_decay,
    )
    install(clip.model, plan.attention_plan)
    if plan.checkpointing:
        enable_checkpointing(clip)
    norms = choose_batch_norm(
        clip.model,
        pretrained=clip.pretrained,
        batch_size=batch_size,
        micro_batch_size=plan.micro_batch_size,
    )
    sizes = len(executions.by_size)
    compilation = compile_towers(clip, execution.policy.compile, image_sizes=sizes)
    halves = HalfWeights.of(clip, precision, choose_half_weights(clip, execution.precision, clip.device.type))
    _compile_ahead(clip, executions, batch_size, compilation, halves, precision)
    step = Step(
        clip,
        objective,
        optimizer,
        precision,
        clip_norm=spec.train.clip_norm,
        micro_batch_size=plan.micro_batch_size,
        batch_norms=BatchNorms(clip.model, frozen=norms.value == FROZEN),
        teacher=None if teacher is None else _as_planned(teacher, execution),
        half_weights=halves,
        compilation=compilation,
    )
    return Assembly(
        step=step,
        objective=objective,
        optimizer=optimizer,
        precision=precision,
        compilation=compilation,
        exact_in_parts=norms.value == FROZEN or not has_batch_norm(clip.model),
    )


def _compile_ahead(
    clip: Clip,
    executions: Executions,
    batch_size: int,
    compilation: Compilation,
    halves: HalfWeights | None,
    precision: Precision,
) -> None:
    """What the steps need at every size; among the stand-ins where the batch is divided, as they will be."""
    for divided in (False, True):
        passes = {
            one
            for size, planned in executions.by_size.items()
            if (planned.plan.micro_batch_size < batch_size) is divided
            for one in passes_of(
                clip.at(size), batch_size, planned.plan.micro_batch_size, planned.text_tokens
            )
        }
        with halves.standing_in() if halves and divided else nullcontext():
            compilation.warm_up(passes, precision.autocast)


def _as_planned(teacher: Clip, execution: Execution) -> StartingModel:
    """The teacher, computed as the student is."""
    make_lean(teacher, execution.lean)
    install(teacher.model, execution.plan.attention_plan)
    return StartingModel(teacher)
