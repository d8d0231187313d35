"""From a job's folder to a training that can begin, or go on where the last attempt stood.

Enters: the job's folder. Leaves: how the attempt ended. Called by `main`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from cliptune.errors import (
    DataError,
    ImageDecodeError,
    ImageSizeError,
    InvalidInputError,
    ModelNotFoundError,
)
from cliptune.internal.v1 import trainer_pb2
from cliptune_model.attention import install
from cliptune_model.clip import Clip, build
from cliptune_model.exported import load_exported
from cliptune_trainer.contract import check_own_code
from cliptune_trainer.data.dataset import Dataset, read_dataset
from cliptune_trainer.data.findings import load_findings
from cliptune_trainer.data.forms.columns import Wording
from cliptune_trainer.data.loading.known import KnownFeatures
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.evaluation.measurement import EvaluationInterrupted
from cliptune_trainer.guard.general import Probe
from cliptune_trainer.guard.measure import decide_guard, open_probe
from cliptune_trainer.job import JobFolder
from cliptune_trainer.losses.entry import TEACHER
from cliptune_trainer.plan.decide import Decisions, Hardware, decide, decide_hardware
from cliptune_trainer.plan.per_size import Executions, plan_sizes
from cliptune_trainer.plan.planning import Planner
from cliptune_trainer.report.write import write_report
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec import Spec
from cliptune_trainer.steps.frozen_features import know, plan_frozen, unreadable
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.trainable import make_trainable
from cliptune_trainer.training.checkpoint import (
    CorruptCheckpointError,
    TrainingState,
    checkpoints,
    load_state,
    sweep,
)
from cliptune_trainer.training.hold import Ending
from cliptune_trainer.training.loop import Training


def run(job: JobFolder, roots: Sequence[Path], reporter: Reporter, inbox: Inbox, *, linked: bool) -> Ending:
    """Trains the job. Raises a `CliptuneError` for what cannot be trained; anything else is a crash."""
    spec = job.spec()
    check_own_code(job.own_code, spec.loss, spec.model.similarity)
    hardware = decide_hardware(spec, job.home)
    device = hardware.device.value
    known = load_findings(job.findings)
    dataset = read_dataset(
        spec.data,
        DataRoots(roots),
        seed=spec.train.seed,
        wording=Wording(names=spec.evaluation.label_names, templates=spec.evaluation.prompt_templates),
        known=known,
        cache=job.path,
    )
    found = _newest_checkpoint(job, device, reporter)
    clip, state = found or (build(spec.model, device=device, seed=spec.train.seed), None)
    clip, _ = make_trainable(clip, spec)
    # The order of additions depends on the number of threads: a resumed run keeps the first one's.
    _make_repeatable(device, int(state.counters["threads"] if state else hardware.threads.value))
    decisions = decide(spec, hardware, dataset, clip, resumed=state is not None)
    if known is None:
        for remark in decisions.remarks:
            reporter.notice(remark.code, remark.message, warning=remark.warning)
    elif known.tables != dataset.findings.tables:
        reporter.notice(
            "data-changed", "the data files are not the ones that were prepared; they were read anew"
        )
    executions = plan_executions(job, spec, hardware, decisions, dataset, clip, state)
    execution = executions.common
    where = f"goes on after step {state.step} of" if state else "begins:"
    reporter.milestone(
        f"training {where} {decisions.total_steps} steps on {device} in {execution.precision}:"
        f" {decisions.batch_size} pairs a step, {execution.plan.micro_batch_size} at once"
        f" ({execution.plan.source}), attention {execution.plan.attention}, checkpointing"
        f" {'on' if execution.plan.checkpointing else 'off'}"
    )
    taught = TEACHER in spec.loss.needs
    # A checkpoint is as if its weights were pretrained: what was decided at the beginning holds.
    guarded = state.counters.get("guarded", False) if state else decide_guard(spec, clip).value == "on"
    training = Training(
        job=job,
        spec=spec,
        dataset=dataset,
        clip=clip,
        decisions=decisions,
        executions=executions,
        state=state,
        reporter=reporter,
        inbox=inbox,
        linked=linked,
        teacher=build(spec.model, device=device, seed=spec.train.seed) if taught else None,
        probe=_probe(job, spec, roots, reporter, inbox) if guarded and len(dataset.validation) else None,
        known=_known(spec, dataset, decisions, executions, clip, reporter, inbox),
    )
    ending = training.run()
    if ending.outcome == trainer_pb2.OUTCOME_SUCCEEDED:
        del training  # the device's memory is the report's now
        write_report(job, spec, dataset, decisions, reporter)
    return ending


def _probe(job: JobFolder, spec: Spec, roots: Sequence[Path], reporter: Reporter, inbox: Inbox) -> Probe:
    """What the guard measures general knowledge by."""

    def check() -> None:
        if inbox.end_wanted:
            raise EvaluationInterrupted

    def tell(told: str) -> None:
        reporter.notice("guard-agreement", told, warning=False)

    return open_probe(spec, DataRoots(roots), examined=True, check=check, tell=tell, cache=job.path)


def _known(
    spec: Spec,
    dataset: Dataset,
    decisions: Decisions,
    executions: Executions,
    clip: Clip,
    reporter: Reporter,
    inbox: Inbox,
) -> KnownFeatures | None:
    """What frozen towers make of the training rows; None: steps compute it."""
    rows_seen = decisions.total_steps * decisions.batch_size
    plan = plan_frozen(spec, dataset.train, clip, decisions.sizes, rows_seen=rows_seen)
    if not (plan.images or plan.texts):
        return None
    execution = executions.common
    install(clip.model, execution.plan.attention_plan)
    try:
        return know(
            clip,
            dataset.train,
            plan,
            Precision(execution.precision, clip.device),
            size=executions.largest,
            exact=decisions.exact_decode,
            rows=execution.plan.micro_batch_size,
            check=lambda: inbox.end_wanted,
        )
    except (DataError, ImageDecodeError, ImageSizeError, OSError) as error:
        reporter.notice("features-unknown", unreadable(error))
        return None


def plan_executions(
    job: JobFolder,
    spec: Spec,
    hardware: Hardware,
    decisions: Decisions,
    dataset: Dataset,
    clip: Clip,
    state: TrainingState | None,
) -> Executions:
    """As the checkpoint says, so that the rest of the run is computed as its beginning was; or anew."""
    stored = state.counters.get("execution") if state else None
    if stored is not None and stored["device"] != clip.device.type:
        stored = None

    def planner(spec: Spec, clip: Clip) -> Planner:
        return Planner.of_job(spec, hardware, clip, job.home, decisions, dataset, on_device=True)

    return plan_sizes(planner, spec, clip, decisions.sizes, stored)


def _newest_checkpoint(job: JobFolder, device: str, reporter: Reporter) -> tuple[Clip, TrainingState] | None:
    """The newest whole checkpoint; those that are not whole are told of and removed."""
    sweep(job.checkpoints)
    for folder in checkpoints(job.checkpoints):
        try:
            state = load_state(folder)
            return load_exported(folder / "model", device=device), state
        except (CorruptCheckpointError, InvalidInputError, ModelNotFoundError) as error:
            reporter.notice("checkpoint-unreadable", f"{error}; the one before it is used")
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _make_repeatable(device: str, threads: int) -> None:
    """On the CPU the same steps give the same bits."""
    torch.set_num_threads(threads)
    if device == "cpu":
        torch.use_deterministic_algorithms(True)
        # Not needed for repeatable results, and it costs a write of every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
