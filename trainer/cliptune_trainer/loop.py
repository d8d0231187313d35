"""A run of a job, top to bottom: data → towers → loss → step → events → checkpoint → evaluation → export.

Enters: the job's folder and an inbox. Leaves: events, checkpoints, and a finished model, or a checkpoint to
go on from. Called by `main`. Between two steps the training is a pure function of what a checkpoint holds;
whatever it is told, it does there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import torch

from cliptune.errors import (
    CancelledError,
    CliptuneError,
    DiskFullError,
    InvalidInputError,
    JobStateError,
)
from cliptune.internal.v1 import trainer_pb2
from cliptune.tracing import tracer
from cliptune.v1 import job_pb2
from cliptune_model.clip import Clip
from cliptune_model.device import device_memory_bytes
from cliptune_trainer.checkpoint import TrainingState, random_state, restore_random_state, save_checkpoint
from cliptune_trainer.commands import Inbox, command_name
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.data.loader import Loader
from cliptune_trainer.data.table import Pair
from cliptune_trainer.decide import Decisions
from cliptune_trainer.evaluation import EvaluationInterrupted, evaluate
from cliptune_trainer.events import Reporter
from cliptune_trainer.export import export
from cliptune_trainer.hold import Ending, attempt_write, hold
from cliptune_trainer.job import JobFolder
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.optim import build_optimizer, load_state_tensors, state_tensors
from cliptune_trainer.pace import Pace
from cliptune_trainer.precision import Precision
from cliptune_trainer.schedule import PeakHistory, Schedule
from cliptune_trainer.spec import Spec, check_learning_rate
from cliptune_trainer.step import Step, StepResult

_log = logging.getLogger(__name__)
# Steps in a row whose loss or gradient may be no finite number. fp16's scaler needs a few at its start.
MAX_SKIPPED_IN_ROW: Final = 10
# Rows that go bad while training are told one by one up to here.
_MAX_ROW_NOTICES: Final = 10
_OPTIMIZER: Final = "optimizer/"


class Training:
    """A job between its first step and its export. `run` it once.

    Args:
        job: the job's folder.
        spec: the job.
        dataset: its rows.
        clip: the model, on its device, with the weights of `state` if there is one.
        decisions: what the spec left open.
        state: the checkpoint to go on from; None: from the first step.
        reporter: takes the events.
        inbox: gives the instructions.
        linked: a daemon may speak through the inbox, so that it is worth waiting for its word.
    """

    def __init__(
        self,
        *,
        job: JobFolder,
        spec: Spec,
        dataset: Dataset,
        clip: Clip,
        decisions: Decisions,
        state: TrainingState | None,
        reporter: Reporter,
        inbox: Inbox,
        linked: bool,
    ) -> None:
        self._job, self._spec, self._dataset, self._clip = job, spec, dataset, clip
        self._decisions, self._reporter, self._inbox, self._linked = decisions, reporter, inbox, linked
        self._total_steps, self._steps_per_epoch = decisions.total_steps, decisions.steps_per_epoch
        counters = state.counters if state else {}
        self._step = state.step if state else 0
        self._saved_step = state.step if state else -1
        self._evaluated_step = int(counters.get("evaluated_step", -1))
        self._metrics: dict[str, float] = counters.get("metrics", {})
        self._skipped_in_row = int(counters.get("skipped_in_row", 0))
        self._initial_peak = float(counters.get("initial_peak", decisions.learning_rate))
        self._peaks = PeakHistory(job.learning_rates, self._initial_peak)
        self._schedule = Schedule(
            shape=spec.train.schedule,
            total_steps=self._total_steps,
            warmup_fraction=spec.train.warmup_fraction,
        )
        self._precision = Precision(decisions.hardware.precision.value, clip.device.type)
        self._optimizer = build_optimizer(
            clip.model,
            learning_rate=decisions.learning_rate,
            weight_decay=spec.train.weight_decay,
            scaled=self._precision.scaler is not None,
        )
        self._take_step = Step(
            clip, LOSSES[spec.loss], self._optimizer, self._precision, clip_norm=spec.train.clip_norm
        )
        self._loader = Loader(
            dataset.train,
            clip,
            augmentation=spec.data.augmentation,
            exact=decisions.exact_decode,
            batch_size=decisions.batch_size,
            seed=spec.train.seed,
            workers=decisions.workers,
            max_bad=int(spec.data.max_bad_fraction * len(dataset.train)),
            bad_rows=counters.get("bad_rows", ()),
            on_bad_row=self._on_bad_row,
            on_workers_lost=self._on_workers_lost,
        )
        self._pace = Pace(decisions.batch_size)
        self._epoch_span = ExitStack()
        torch.manual_seed(spec.train.seed)
        if state:
            self._restore(state)

    def run(self) -> Ending:
        """Trains to the end, or until told to stop."""
        self._clip.model.train()
        with self._loader, self._epoch_span:
            batches = self._loader.batches(self._step, self._total_steps)
            while True:
                if ending := self._obey():
                    return ending
                if (occasion := self._evaluation_due()) and not self._evaluate(occasion):
                    continue  # it gave way to an instruction
                if self._checkpoint_due() and (ending := self._save_or_hold()):
                    return ending
                if self._step == self._total_steps:
                    break
                self._begin_step()
                batch = next(batches)
                result = self._take_step(batch, self._learning_rate())
                self._end_step(result)
        return self._export()

    def _learning_rate(self) -> float:
        return self._peaks.at(self._step) * self._schedule.share(self._step)

    def _begin_step(self) -> None:
        epoch, index = divmod(self._step, self._steps_per_epoch)
        self._pace.resume()
        if index == 0 or self._step == max(self._saved_step, 0):
            self._epoch_span.close()
            span = tracer().start_as_current_span("train.epoch", attributes={"epoch": epoch})
            self._epoch_span.enter_context(span)

    def _end_step(self, result: StepResult) -> None:
        learning_rate = self._learning_rate()
        self._step += 1
        self._pace.step_done()
        if result.skipped:
            self._on_skipped(result)
            return
        self._skipped_in_row = 0
        if self._step % self._spec.train.progress_every_steps and self._step != self._total_steps:
            return
        self._reporter.progress(
            job_pb2.Progress(
                step=self._step,
                total_steps=self._total_steps,
                epoch=self._step / self._steps_per_epoch,
                loss=result.loss,
                learning_rate=learning_rate,
                logit_scale=result.logit_scale,
                gradient_norm=result.gradient_norm,
                samples_per_second=self._pace.samples_per_second(),
                device_memory_bytes=device_memory_bytes(str(self._clip.device)),
                eta_seconds=self._pace.eta_s(self._total_steps - self._step),
            )
        )

    def _on_skipped(self, result: StepResult) -> None:
        self._skipped_in_row += 1
        what = "loss" if result.loss != result.loss or abs(result.loss) == float("inf") else "gradient"
        if self._skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise InvalidInputError(
                f"the {what} was no finite number in {self._skipped_in_row} steps in a row, up to step"
                f" {self._step}: lower train.learning_rate, or use train.precision = 'fp32'",
                step=self._step,
            )
        self._reporter.notice(
            "step-skipped", f"step {self._step}: the {what} is no finite number; no weight was changed"
        )

    # -- evaluation
    # ------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> str | None:
        """The occasion, if the place in the run is one and it has not been measured yet."""
        if self._evaluated_step == self._step or not len(self._dataset.validation):
            return None
        if self._step == 0:
            return "before"
        if self._step == self._total_steps:
            return "after"
        epoch, index = divmod(self._step, self._steps_per_epoch)
        every = self._spec.evaluation.every_epochs
        return "during" if every and index == 0 and epoch % every == 0 else None

    def _evaluate(self, occasion: str) -> bool:
        """Measures and tells; False when it gave way to an instruction that ends the attempt."""
        with tracer().start_as_current_span(
            "evaluate", attributes={"occasion": occasion, "step": self._step}
        ):
            try:
                measured = evaluate(
                    self._clip,
                    self._dataset.validation,
                    self._decisions.classes,
                    batch_size=self._spec.evaluation.batch_size,
                    interrupted=lambda: self._inbox.end_wanted,
                )
            except EvaluationInterrupted:
                return False
        if measured.unreadable:
            self._reporter.notice(
                "images-unreadable", f"{measured.unreadable} validation images cannot be read any more"
            )
        self._reporter.evaluation(self._step, occasion, measured.metrics, measured.samples)
        if occasion != "requested":
            self._evaluated_step, self._metrics = self._step, measured.metrics
        return True

    # -- checkpoints and export
    # ------------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        if self._saved_step == self._step or self._step == 0:
            return False
        every = self._spec.checkpoint.every_steps or self._steps_per_epoch
        return self._step % every == 0 or self._step == self._total_steps

    def _save(self) -> None:
        """Writes a checkpoint and tells of it."""
        with tracer().start_as_current_span("checkpoint", attributes={"step": self._step}):
            size_bytes = save_checkpoint(
                self._job.checkpoints,
                self._clip,
                self._state(),
                keep=self._spec.checkpoint.keep,
                job_id=self._job.job_id,
            )
        self._saved_step = self._step
        self._reporter.checkpoint(self._step, size_bytes)

    def _save_or_hold(self) -> Ending | None:
        error = attempt_write(self._save)
        return self._hold(error, self._save) if error else None

    def _hold(self, error: DiskFullError, write: Callable[[], None]) -> Ending | None:
        if not self._linked:
            raise error
        return hold(self._inbox, self._reporter, error, write=write, save=self._save)

    def _state(self) -> TrainingState:
        values, tensors = random_state(self._clip.device)
        scaler = self._precision.scaler
        optimizer = {
            _OPTIMIZER + name: tensor.detach().cpu().contiguous()
            for name, tensor in state_tensors(self._optimizer).items()
        }
        return TrainingState(
            step=self._step,
            counters={
                "evaluated_step": self._evaluated_step,
                "metrics": self._metrics,
                "skipped_in_row": self._skipped_in_row,
                "initial_peak": self._initial_peak,
                "bad_rows": sorted(self._loader.bad_rows),
                "threads": torch.get_num_threads(),
                "random": values,
                "scaler": scaler.state_dict() if scaler else None,
            },
            tensors=optimizer | tensors,
        )

    def _restore(self, state: TrainingState) -> None:
        load_state_tensors(
            self._optimizer,
            {
                name.removeprefix(_OPTIMIZER): tensor
                for name, tensor in state.tensors.items()
                if name.startswith(_OPTIMIZER)
            },
        )
        if self._precision.scaler is not None and state.counters["scaler"] is not None:
            self._precision.scaler.load_state_dict(state.counters["scaler"])
        restore_random_state(self._clip.device, state.counters["random"], state.tensors)

    def _export(self) -> Ending:
        with tracer().start_as_current_span("export"):
            error = attempt_write(self._write_export)
        if error and (ending := self._hold(error, self._write_export)):
            return ending
        export_path = self._job.export.relative_to(self._job.path).as_posix()
        return Ending(outcome=trainer_pb2.OUTCOME_SUCCEEDED, export_path=export_path)

    def _write_export(self) -> None:
        self._clip.model.eval()
        export(self._job, self._clip, precision=self._precision.name, metrics=self._metrics)

    # -- instructions
    # ----------------------------------------------------------------------------------------------

    def _obey(self) -> Ending | None:
        """Carries out what waits in the inbox; the attempt's end if that was asked for."""
        while (instruction := self._inbox.next()) is not None:
            name = command_name(instruction)
            if name == "suspend":
                return self._suspend()
            error = self._carry_out(name, instruction)
            self._reporter.command_done(instruction.command_id, name, error)
            if isinstance(error, DiskFullError) and name in ("pause", "checkpoint"):
                if ending := self._hold(error, self._save):
                    return ending
            elif error is None and name == "pause":
                return Ending(outcome=trainer_pb2.OUTCOME_PAUSED)
            elif error is None and name == "cancel":
                return Ending(outcome=trainer_pb2.OUTCOME_CANCELLED)
        return None

    def _suspend(self) -> Ending:
        if self._saved_step != self._step and (error := attempt_write(self._save)):
            self._reporter.notice(
                "checkpoint-failed",
                f"{error.message}: the steps since the last checkpoint are repeated later",
            )
        return Ending(outcome=trainer_pb2.OUTCOME_SUSPENDED)

    def _carry_out(self, name: str, instruction: trainer_pb2.Instruction) -> CliptuneError | None:
        """Does what can be done and the run goes on after; returns why not."""
        if name in ("pause", "checkpoint"):
            return attempt_write(self._save)
        if name == "cancel":
            return None
        if name == "evaluate":
            if not len(self._dataset.validation):
                return InvalidInputError("the job has no validation rows to evaluate on")
            if not self._evaluate("requested"):
                return CancelledError("the evaluation gave way to the end of the run")
            return None
        if name == "set_learning_rate":
            return self._set_learning_rate(instruction.command.set_learning_rate.learning_rate)
        return JobStateError(f"the job is RUNNING: it cannot {name or 'do what was asked'}", state="RUNNING")

    def _set_learning_rate(self, learning_rate: float) -> CliptuneError | None:
        try:
            check_learning_rate(learning_rate, "learning_rate")
        except CliptuneError as error:
            return error
        return attempt_write(lambda: self._peaks.change(self._step, learning_rate))

    # -- what the loader finds
    # -------------------------------------------------------------------------------------

    def _on_bad_row(self, pair: Pair, reason: str) -> None:
        if len(self._loader.bad_rows) <= _MAX_ROW_NOTICES:
            self._reporter.notice("image-unreadable", f"row {pair.row}: {reason}; other rows take its place")
        else:
            _log.info("row %d: %s", pair.row, reason)

    def _on_workers_lost(self) -> None:
        self._reporter.notice("workers-lost", "the loader's processes died; images are read in threads now")
